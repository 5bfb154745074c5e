"""nativerank COMMAND ...: finds the command, turns errors of the user into one line and exit code 2.

A command is a module here with `add_parser(subparsers)`. Only the module of the command that was asked for is
imported, and each imports what is heavy inside its functions, so `nativerank --help` stays under a second.

Exit codes: 0 done, 2 bad input, 3 training diverged, 4 a process of the run hangs or has left, 130 and 143 after SIGINT
and SIGTERM.
"""

import argparse
import atexit
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from nativerank.config import nearest
from nativerank.version import __version__

COMMANDS = {
    "train": "pretrain a model: a checkpointed, resumable run",
    "data": "prepare, describe and verify training data",
    "plan": "what a run will cost: parameters, FLOPs, bytes, time, before it is made",
    "generate": "continue a prompt with a trained model",
    "eval": "how good trained models are on texts, questions and tasks, side by side",
    "export": "write a trained model in the form that others read, checked",
    "convert": "turn a dense model into factors that training goes on from",
    "scaling": "scaling laws: sweeps at equal compute, fits with intervals, what to train",
    "watch": "a run on the terminal while it goes on, also over ssh",
    "report": "what runs, comparisons and sweeps did, as one HTML page",
    "compare": "train methods side by side: rates, seeds, budgets, statistics",
    "reproduce": "published claims, run: cards with verdicts",
    "bench": "measure speed, as ratios within one process",
}

SILENT_SECONDS = 0.3
USAGE = "usage: nativerank COMMAND ...   (nativerank COMMAND --help for more)"


class UsageError(ValueError):
    """Bad flags; the message is the one line to show."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of printing pages and exiting."""

    def error(self, message: str):
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which tells what a CPU lacks
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if "RANK" in os.environ:  # one of many: PyTorch prints a C++ stack for every process that is gone, we print a line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = run(argv)
        sys.stdout.flush()  # here, so that a reader who left is noticed here
        return code
    except KeyboardInterrupt:
        print("nativerank: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `nativerank ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        first_line = " ".join(str(error).split("\n")[0].split())
        where = "" if os.environ.get("RANK", "0") == "0" else f"rank {os.environ['RANK']}: "
        if getattr(error, "silent", False):  # another process says it; torchrun ends all when the first one leaves
            time.sleep(SILENT_SECONDS)
        else:
            print(f"nativerank: error: {where}{first_line}", file=sys.stderr, flush=True)
        if os.environ.get("NATIVERANK_TRACEBACK"):
            raise
        return int(getattr(error, "exit_code", 2))


def leave(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> NoReturn:
    """Ends this process with the exit code of a command.

    One process of many ends without the interpreter's shutdown. Gloo's threads let go of tensors a moment after their
    collective, for which they need the interpreter; a thread that asks for it in the shutdown aborts the process
    (signal 6 in place of the exit code; pytorch issue 190489), however well the groups were destroyed before.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(command(argv))
    try:
        code = command(argv)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def console() -> NoReturn:
    """The installed script and `python -m nativerank`."""
    leave(main, sys.argv[1:])


def run(argv: Sequence[str]) -> int:
    """Dispatches to the command's module."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"nativerank {__version__}")
        return 0
    command = argv[0]
    if command not in COMMANDS:
        raise UsageError(f"unknown command {command!r}{nearest(command, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    parser = Parser(prog="nativerank", add_help=False)
    subparsers = parser.add_subparsers(parser_class=Parser)
    importlib.import_module(f"nativerank.cli.{command}").add_parser(subparsers)
    try:
        arguments = parser.parse_args(argv)
        return int(arguments.run(arguments) or 0)
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)


def overview() -> str:
    """What `nativerank --help` prints."""
    lines = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return f"""nativerank {__version__}: pretrain language models natively in low rank

{USAGE}

commands:
{lines}

examples:
  nativerank train                                # a small model on the built-in corpus, minutes on a laptop
  nativerank train --model.preset pocket --method lowrank-adamw --train.steps 200 --out runs/first
  nativerank generate runs/first --prompt "My fellow citizens"
"""
