"""nativerank scaling plan|run|fit|report: sweeps of models at equal compute, and the laws that they follow.

nativerank scaling plan --grid spectron --on h100-sxm              # the cells of a sweep, before any of them runs
nativerank scaling run --grid miniature --jobs 2 --out runs/sweep  # every cell a run of train; goes on where it stopped
nativerank scaling fit runs/sweep                                  # exponents, intervals, figures
nativerank scaling report runs/sweep --budget 1e21                 # what to train
"""

import argparse
import importlib
from typing import Any

from nativerank.config import nearest

ACTIONS = {
    "plan": "the cells of a sweep: sizes, tokens, steps, rates, FLOPs, time",
    "run": "train them, each with its own schedule; goes on where it stopped",
    "fit": "IsoFLOP minima, power laws and parametric laws, with intervals",
    "report": "which model to train for a budget, dense against low rank",
}


def add_parser(subparsers: Any) -> None:
    """Hands everything after `scaling` to the parser of its action."""
    parser = subparsers.add_parser("scaling", add_help=False, prefix_chars="\0")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(run=lambda arguments: run(arguments.rest))


def run(argv: list[str]) -> int:
    """Dispatches to the module of an action."""
    if argv and argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    return int(module_of(argv).run(argv[1:]))


def parse(argv: list[str]) -> Any:
    """What `run` reads from its words, without doing it; errors are its errors."""
    return module_of(argv).parse(argv[1:])


def module_of(argv: list[str]) -> Any:
    """The module of an action.

    Raises:
        ValueError: no action, or an unknown one.
    """
    if not argv or argv[0] not in ACTIONS:
        hint = nearest(argv[0], ACTIONS) if argv else ""
        got = f"unknown action {argv[0]!r}{hint}" if argv else "no action"
        raise ValueError(f"{got}: nativerank scaling takes {', '.join(ACTIONS)}")
    return importlib.import_module(f"nativerank.cli.scaling_{argv[0]}")


def overview() -> str:
    """What `nativerank scaling --help` prints."""
    lines = "\n".join(f"  {name:<8} {what}" for name, what in ACTIONS.items())
    return f"""usage: nativerank scaling {{{",".join(ACTIONS)}}} ...   (each with --help)

compute-optimal models, dense and in low rank: sweep, fit, decide

actions:
{lines}

example:
  nativerank scaling run --grid miniature --jobs 2 --out runs/sweep
  nativerank scaling fit runs/sweep
  nativerank scaling report runs/sweep --budget 1e14
"""
