"""nativerank compare: methods side by side, from flags to a folder with table, figures and numbers.

nativerank compare --methods spectron,lowrank-adamw --lrs 0.5x,1x,2x --seeds 3 --model.preset pocket --out runs/two
nativerank compare --methods spectron,dense-adamw --tune --model.preset pocket --jobs 2 --out runs/tuned
nativerank compare --study ablation --jobs 2 --out runs/ablation
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nativerank.cli.output import check_json, teller, write_json
from nativerank.cli.train import build_parser, parse
from nativerank.config import RunConfig, differences, to_dict
from nativerank.terminal import console as open_console

DESCRIPTION = """Train methods on identical data from identical dense matrices and say which is better, by how much and
how surely. Arms x rates x seeds; or, with --tune, a line search of every arm's rates. Calling it again continues."""
EXAMPLE = """examples:
  nativerank compare --methods spectron,lowrank-adamw --lrs 0.5x,1x,2x --model.preset pocket --jobs 2 --out runs/two
  nativerank compare --methods "spectron,spectron[optim.nesterov=true]" --model.preset pocket --out runs/nesterov
  nativerank compare --methods spectron,dense-muon --budget flops --tune --model.preset pocket --out runs/tuned
  nativerank compare --study lr-robustness --jobs 2 --out runs/robust

An arm may carry settings in brackets, KEY=VALUE separated by ; or , (any key below). Rates are absolute, or multiples
of the arm's default for the preset: 0.5x. Studies: ablation, lr-robustness, update-norm, equal-flops,
adaptive-rank, diloco, frames.
"""
LISTS = {"lrs": "optim.lr", "aux_lrs": "optim.aux_lr", "init_scales": "model.init_scale"}
OWN = ("methods", *LISTS, "ratios", "tune")  # what a study decides itself
# A spike must not set one arm's data back, so no checkpoints to go back to; validations on the way are for the curves.
DEFAULTS: dict[str, Any] = {"train.checkpoint_every": 0, "train.eval_tokens": 8192}
GIVEN_ELSEWHERE = {"method": "--methods", "resume": "nothing: cells always go on", "train.seed": "--seeds"}


def add_parser(subparsers: Any) -> None:
    """Hands everything after `compare` to the typed parser."""
    parser = subparsers.add_parser("compare", add_help=False, prefix_chars="\0")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(run=lambda arguments: run(arguments.rest))


def compare_parser(defaults: dict[str, Any]) -> Any:
    """The flags of a comparison, and the train flags with other defaults."""
    usage = "[--methods A,B | --study NAME] [--tune] [--lrs L] --out DIR "
    parser = build_parser(DESCRIPTION, EXAMPLE, "nativerank compare", usage, add_flags)
    parser.set_defaults(defaults)
    return parser


def add_flags(parser: Any) -> None:
    """What a comparison takes besides the train flags; all texts, read by `read_request`."""
    group = parser.add_argument_group("comparison")
    group.add_argument("--methods", metavar="A,B,...", help="the arms, METHOD or METHOD[KEY=VALUE;...]")
    for name, key in LISTS.items():
        group.add_argument(
            f"--{name}", metavar="LIST", help=f"values of {key}, or multiples such as 0.5x (without: 1x)"
        )
    group.add_argument("--ratios", metavar="LIST", help="rank ratios; every low-rank arm once with each")
    group.add_argument(
        "--tune",
        nargs="?",
        const="",
        metavar="LIST",
        help="line search over coordinates instead of a grid (alone: lr,aux_lr,init_scale,lr)",
    )
    group.add_argument("--seeds", metavar="N", help="seeds 0 .. N-1 (without: 3, or the study's)")
    group.add_argument("--budget", metavar="tokens|flops", help="what all arms have in common (without: tokens)")
    group.add_argument("--jobs", metavar="K", help="runs side by side, the threads divided among them (without: 1)")
    group.add_argument("--study", metavar="NAME", help="a study with arms of its own")
    group.add_argument("--plan", action="store_true", help="show the runs it would make and their time; make none")


def read_request(argv: list[str]) -> tuple[Any, Any]:
    """(request, namespace with quiet and json) from flags.

    Raises:
        ValueError: anything wrong with them.
    """
    from nativerank.experiments.request import Request
    from nativerank.experiments.studies import find_study

    name = named_study(argv)
    study = find_study(name) if name is not None else None
    config, flags = parse(argv, compare_parser({**(study.defaults if study else {}), **DEFAULTS}))
    common = common_settings(config, GIVEN_ELSEWHERE, "comparison")
    if config.out is None:
        raise ValueError("compare needs --out DIR, the folder of the comparison")
    if study and flags.budget:
        raise ValueError(f"--study {name} has its own budget, so --budget has no meaning")
    if flags.budget not in (None, "tokens", "flops"):
        raise ValueError(f"--budget is tokens or flops, got {flags.budget!r}")
    return Request(
        folder=Path(config.out),
        common=common,
        study=name,
        budget=study.budget if study else flags.budget or "tokens",
        seeds=whole("seeds", flags.seeds, study.seeds if study else 3),
        jobs=whole("jobs", flags.jobs, 1),
        **(refuse_own(str(name), flags) if study else arms_and_grid(flags, common)),
    ), flags


def named_study(argv: list[str]) -> str | None:
    """What follows --study; its defaults are needed before the other flags are read."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--study":
            return following
        if word.startswith("--study="):
            return word.partition("=")[2]
    return None


def common_settings(config: RunConfig, elsewhere: Mapping[str, str], where: str) -> dict[str, Any]:
    """The train flags that were given, by dotted key.

    Args:
        config: from flags.
        elsewhere: keys that another flag gives, with that flag; where: what has it.
    """
    plain = to_dict(config)
    settings: dict[str, Any] = {}
    for key in differences(config, RunConfig()):
        if key in elsewhere:
            raise ValueError(f"--{key} is given by {elsewhere[key]} in a {where}")
        value: Any = plain
        for part in key.split("."):
            value = value[part]
        settings[key] = value
    settings.pop("out", None)
    return settings


def refuse_own(study: str, flags: Any) -> dict[str, Any]:
    """Raises a ValueError for a flag that a study decides itself."""
    for name in OWN:
        if getattr(flags, name) is not None:
            raise ValueError(f"--study {study} has its own arms and rates, so --{name} has no meaning")
    return {}


def arms_and_grid(flags: Any, common: dict[str, Any]) -> dict[str, Any]:
    """The arms, and the product grid or the stages of a search."""
    from nativerank.experiments.arms import RANKS, parse_arms, parse_values, with_ratios
    from nativerank.experiments.search import ALL_STAGES, parse_stages

    if flags.methods is None:
        raise ValueError("compare needs --methods A,B,... or --study NAME")
    arms = parse_arms(flags.methods)
    if flags.ratios is not None:
        fixed = [key for key in RANKS if key in common]
        if fixed:
            raise ValueError(f"give --{fixed[0]} or --ratios, not both")
        arms = with_ratios(arms, parse_values("--ratios", flags.ratios))
    given = {name: getattr(flags, name) for name in LISTS if getattr(flags, name) is not None}
    grid = {LISTS[name]: parse_values(f"--{name}", text) for name, text in given.items()}
    if flags.tune is None:
        return {"arms": arms, "grid": grid}
    if given:
        raise ValueError(f"--tune searches by itself, so --{next(iter(given))} has no meaning")
    return {"arms": arms, "stages": parse_stages(flags.tune or ALL_STAGES)}


def whole(name: str, text: str | None, default: int) -> int:
    """A whole number of at least 1."""
    if text is None:
        return default
    if not str(text).isdecimal() or int(text) < 1:
        raise ValueError(f"--{name} must be a whole number of at least 1, got {text}")
    return int(text)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that the cells are stopped and saved."""

    def leave(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(argv: list[str]) -> int:
    """Compares, draws and shows."""
    request, flags = read_request(argv)
    check_json(flags.json)
    from nativerank.experiments.request import carry_out, plan

    if flags.plan:
        lines = plan(request)
        if not write_json({"plan": lines}, flags.json):
            print("\n".join(lines))
        return 0
    say = teller(flags)
    try:
        with terminated_like_interrupted():
            record = carry_out(request, say)
    except (KeyboardInterrupt, SystemExit):
        print("nativerank: the cells that ran are saved; the same command goes on from there", file=sys.stderr)
        raise
    files = draw_figures(record, request.folder, say)
    if not write_json(record, flags.json) and not flags.quiet:
        show(record)
    say(f"{request.folder}: {', '.join(['table.md', 'compare.json', 'results.jsonl', *files])}")
    return judged(record)


def judged(record: dict[str, Any]) -> int:
    """Exit code: 1 if no cell got as far as a result, a divergence being one; then the first reason is shown."""
    reasons = [cell.get("error", cell.get("refused")) for cell in record["cells"]]
    if not reasons or None in reasons:
        return 0
    print(f"nativerank: error: no run finished; the first one: {reasons[0]}", file=sys.stderr)
    return 1


def draw_figures(record: dict[str, Any], folder: Path, say: Callable[[str], None]) -> list[str]:
    """The names of the figures; without matplotlib one line on how to get them."""
    from nativerank.report import plots

    try:
        return [file.name for file in plots.draw(record, folder)]
    except ImportError:
        say(plots.HINT)
        return []


def show(record: dict[str, Any]) -> None:
    """The table for a terminal, with fewer columns than table.md; its notes as lines below."""
    from rich.markup import escape
    from rich.table import Table

    from nativerank.experiments.table import difference, notes, number

    console = open_console(soft_wrap=True)
    table = Table(title=escape(record["title"]), title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("arm", overflow="fold")  # a name is long, and worth nothing without its end
    for column in ("lr", "aux_lr", "init", "n", "val loss", "sd", "against the first (95%)"):
        table.add_column(column, justify="right", no_wrap=True)
    ranked = sorted(record["arms"], key=lambda e: (e["group"], e["mean"] is None, e["mean"] or 0.0))
    for entry in ranked:
        rates = [number((entry["best"] or {}).get(key), ".4g") for key in LISTS.values()]
        losses = [str(entry["n"]), number(entry["mean"], ".4f"), number(entry["sd"], ".4f")]
        table.add_row(escape(entry["label"]), *rates, *losses, escape(difference(entry)))
    console.print(table, soft_wrap=False)
    lines = [f"{entry['label']}: {notes(entry)}" for entry in ranked if notes(entry)]
    for line in [*lines, *record.get("study", {}).get("lines", [])]:
        console.print(escape(line))
