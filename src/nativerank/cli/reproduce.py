"""nativerank reproduce: runs the reproduction cards, and renders their pages.

nativerank reproduce --jobs 2                          # what is missing of every card at pocket scale
nativerank reproduce sct-ranks --scale desk --minutes 9
nativerank reproduce --render                          # pages and figures from the results as they are
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nativerank.cli.compare import terminated_like_interrupted
from nativerank.cli.flags import add_quiet
from nativerank.cli.output import add_json, check_json, teller, write_json
from nativerank.terminal import console as open_console

DESCRIPTION = """Published claims about low-rank pretraining, run: what is missing of each card, then its verdict,
figure and page. What has run is not run again; an interrupted card goes on."""
EXAMPLE = """examples:
  nativerank reproduce --list
  nativerank reproduce --jobs 2
  nativerank reproduce naive-instability ablation --jobs 2
  nativerank reproduce method-order --scale desk --minutes 9
  nativerank reproduce --render

The cards are the folder reproductions of the repository (--cards). --scale paper plans the publications' own runs.
"""
PAPER = "paper"


def add_parser(subparsers: Any) -> None:
    """Flags of `nativerank reproduce`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("reproduce", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=raw)
    parser.add_argument("card", nargs="*", metavar="CARD", help="names of cards (without: all)")
    parser.add_argument("--scale", default="pocket", help="pocket, desk or paper (without: pocket)")
    parser.add_argument("--cards", type=Path, default=Path("reproductions"), metavar="DIR", help="folder of the cards")
    parser.add_argument("--out", type=Path, default=Path("runs/reproductions"), metavar="DIR", help="for the runs")
    parser.add_argument("--jobs", type=int, default=1, metavar="K", help="runs side by side (without: 1)")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after this time; what ran is saved")
    parser.add_argument("--again", action="store_true", help="also what is neither missing nor stale")
    parser.add_argument("--render", action="store_true", help="run nothing; make pages and figures again")
    parser.add_argument("--list", action="store_true", help="run nothing; show cards and verdicts")
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(flags: Any) -> int:
    """Runs, renders and shows."""
    check_json(flags.json)
    if flags.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {flags.jobs}")
    if flags.minutes is not None and not flags.minutes > 0:
        raise ValueError(f"--minutes must be positive, got {flags.minutes:g}")
    from nativerank.reproduce.card import chosen, read_scales

    names, scales, say = chosen(flags.cards, flags.card), read_scales(flags.cards), teller(flags)
    if flags.scale not in (*scales, PAPER):
        raise ValueError(f"--scale is one of {', '.join([*scales, PAPER])}, got {flags.scale!r}")
    ended = flags.list or flags.render or run_cards(names, scales, flags, say)
    cards = listed(flags.cards)
    if not flags.list:
        from nativerank.reproduce.pages import write_pages

        write_pages(cards, scales, flags.cards)
    record = {card.name: verdict_words(card) for card in cards if card.name in names}
    if not write_json(record, flags.json) and not flags.quiet:
        show(record)
    if not ended:
        say("out of time; the same command goes on")
    return 0


def listed(root: Path) -> list[Any]:
    """Every card with its outcomes."""
    from nativerank.reproduce.card import card_names, read_card
    from nativerank.reproduce.overview import Listed
    from nativerank.reproduce.store import read

    return [Listed(name, read_card(root / name), read(root / name)) for name in card_names(root)]


def verdict_words(card: Any) -> dict[str, dict[str, dict[str, str]]]:
    """scale -> claim -> verdict and why."""
    from nativerank.reproduce.render import verdicts

    found = verdicts(card.name, card.card, card.outcomes)
    return {s: {c: {"verdict": v.word, "why": v.why} for c, v in claims.items()} for s, claims in found.items()}


def run_cards(names: list[str], scales: Any, flags: Any, say: Callable[[str], None]) -> bool:
    """Runs what is missing; whether all of it ended."""
    from nativerank.reproduce.card import read_card
    from nativerank.reproduce.paper import plan_paper
    from nativerank.reproduce.place import OutOfTime

    if flags.scale == PAPER:
        for name in names:
            card = read_card(flags.cards / name)
            if card.paper:
                say(f"{name}: {len(plan_paper(card, flags.cards / name))} runs planned")
        return True
    if scales[flags.scale].needs == "cuda" and not has_cuda():
        say(f"scale {flags.scale} needs a GPU and this machine has none: nothing run")
        return True
    ends = None if flags.minutes is None else time.monotonic() + 60 * flags.minutes
    try:
        with terminated_like_interrupted():
            run_missing(names, scales[flags.scale], flags, ends, say)
    except OutOfTime:
        return False
    except (KeyboardInterrupt, SystemExit):
        print("nativerank: the runs are saved; the same command goes on from there", file=sys.stderr)
        raise
    return True


def has_cuda() -> bool:
    """Whether PyTorch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def run_missing(names: list[str], scale: Any, flags: Any, ends: float | None, say: Callable[[str], None]) -> None:
    """Runs the cards that have this scale and no result that is up to date."""
    from nativerank.reproduce.card import read_card
    from nativerank.reproduce.carry_out import carry_out
    from nativerank.reproduce.code_hash import code_hash
    from nativerank.reproduce.expect import expectation
    from nativerank.reproduce.place import Place
    from nativerank.reproduce.store import read, write
    from nativerank.reproduce.together import run_together

    key = flags.scale
    place = Place(flags.out / f"{key}-{code_hash()}", flags.jobs, ends, say)
    missing = {}
    for name in names:
        card = read_card(flags.cards / name)
        known = read(flags.cards / name).get(key)
        if key not in card.scales:
            say(f"{name}: nothing at scale {key}")
        elif known and not known.stale(card, key, scale) and not flags.again:
            say(f"{name}: up to date")
        else:
            missing[name] = card
    wanted = [card.scales[key] for card in missing.values()]
    if any(experiments.races for experiments in wanted):
        say(expectation(wanted, scale, place))
    run_together(wanted, scale, place)
    for name, card in missing.items():
        say(f"{name}: {card.title}")
        again = f"nativerank reproduce {name}{'' if key == 'pocket' else f' --scale {key}'} --jobs {flags.jobs}"
        write(flags.cards / name, key, carry_out(card, key, scale, place, again))


def show(record: dict[str, Any]) -> None:
    """Verdicts in 80 columns."""
    from rich.markup import escape
    from rich.table import Table

    console = open_console(soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("card", "claim", "scale", "verdict"):
        table.add_column(column, no_wrap=True)
    for name, scales in record.items():
        rows = [(claim, scale, v["verdict"]) for scale, claims in scales.items() for claim, v in claims.items()]
        for claim, scale, verdict in rows or [("-", "-", "not run")]:
            table.add_row(escape(name), escape(claim), scale, verdict)
    console.print(table)
