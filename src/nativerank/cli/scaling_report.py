"""nativerank scaling report: which model to train for a budget, dense against low rank, and what serving it costs.

nativerank scaling report runs/sweep --budget 1e14
nativerank scaling report fit.json --budget 1e21 --inference 1e12
nativerank scaling report runs/sweep --loss 3.2 --out runs/sweep
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nativerank.cli.main import Parser
from nativerank.cli.output import STDOUT, add_json, check_json, write_json
from nativerank.cli.scaling_fit import fitted
from nativerank.terminal import console as open_console

DESCRIPTION = """The best model of a budget by the laws of a sweep, dense against low rank: what it saves at inference,
what training and serving cost together, and from how many served tokens on low rank pays."""
EXAMPLE = """examples:
  nativerank scaling report runs/sweep --budget 1e14
  nativerank scaling report fit.json --budget 1e21 --inference 1e12
  nativerank scaling report runs/sweep --loss 3.2 --dense dense-muon --lowrank "spectron rho=0.25" --out runs/sweep

Takes what scaling fit takes, or fit.json files that it wrote. A served token costs 2 N FLOPs (6nd), or a third of the
exact FLOPs of training on it. Extrapolations are marked; they are as good as their laws.
"""
REPORT = "scaling-report.json"


def make_parser() -> Any:
    """The flags."""
    import argparse

    parser = Parser(
        prog="nativerank scaling report",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="SWEEP|RUN|FILE.csv|FIT.json", help="runs, or fits of them")
    parser.add_argument("--budget", type=float, metavar="C", help="training FLOPs (without: the largest of the runs)")
    parser.add_argument("--inference", type=float, metavar="T", help="tokens that will be served")
    parser.add_argument("--loss", type=float, metavar="L", help="to be reached (without: the dense one of the budget)")
    parser.add_argument("--dense", metavar="GROUP", help="which group is the dense one (without: the best)")
    parser.add_argument("--lowrank", metavar="GROUP", help="which group is the low-rank one (without: the best)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"for {REPORT} and saving.svg")
    parser.add_argument("--convention", metavar="6nd|exact", help="as in scaling fit")
    parser.add_argument("--count", metavar="total|non_embedding", help="as in scaling fit")
    parser.add_argument("--quiet", action="store_true", help="no table")
    add_json(parser)
    parser.set_defaults(approaches=None, samples=1000, seed=0, level=0.95)
    return parser


def parse(argv: list[str]) -> Any:
    """The flags."""
    return make_parser().parse_args(argv)


def run(argv: list[str]) -> int:
    """Reads or fits, decides, shows."""
    flags = parse(argv)
    check_json(flags.json)
    from nativerank.scaling.decide import decide

    found = read_fit(flags.runs, flags) or fitted(flags)
    record = decide(found, flags.budget, flags.inference, flags.loss, flags.dense, flags.lowrank)
    files = write_files(record, flags.out) if flags.out else []
    if not write_json(record, flags.json) and not flags.quiet:
        show(record)
    if files and not flags.quiet:
        print(f"{flags.out}: {', '.join(files)}", file=sys.stderr if flags.json == STDOUT else sys.stdout)
    return 0


def read_fit(names: list[str], flags: Any) -> dict[str, Any] | None:
    """The records of fit.json files as one; None if something else was named.

    Raises:
        ValueError: one holds no fit, two hold the same group, or runs were named beside them.
    """
    files = [name for name in names if name.endswith(".json")]
    if not files:
        return None
    if len(files) < len(names):
        raise ValueError(f"{files[0]} is fitted already; give fits, or give runs, which are fitted together")
    if flags.convention or flags.count:
        raise ValueError(f"{files[0]} is fitted already, so --convention and --count have no meaning")
    groups: dict[str, Any] = {}
    surfaces: dict[str, Any] = {}
    for file in files:
        found = read_one(file)
        for kind, more in ((groups, found["groups"]), (surfaces, found["surface"] or {})):
            if twice := kind.keys() & more.keys():
                raise ValueError(f"{file}: the group {min(twice)!r} stands in another fit, too")
            kind.update(more)
    return {"groups": groups, "surface": surfaces or None}


def read_one(name: str) -> dict[str, Any]:
    """The record in a fit.json.

    Raises:
        ValueError: it holds none.
    """
    try:
        found: dict[str, Any] = json.loads(Path(name).read_text(encoding="utf-8"))
        found["surface"]
        for group in found["groups"].values():
            laws = [key for key in ("isoflop", "parametric") if group[key]]
            if not (laws and group["curves"]["runs"] and all("draws" in group["curves"][key] for key in laws)):
                raise KeyError("curves")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no fit that `nativerank scaling fit` wrote: {error}") from None
    return found


def write_files(record: dict[str, Any], out: Path) -> list[str]:
    """The record and the figure; their names."""
    from nativerank.experiments.request import put
    from nativerank.report import plots, scaling_plots

    out.mkdir(parents=True, exist_ok=True)
    put(out / REPORT, json.dumps(record, indent=1) + "\n")
    if not record["saving"]:
        return [REPORT]
    try:
        return [REPORT, scaling_plots.draw_saving(record, out / "saving.svg").name]
    except ImportError:
        print(plots.HINT, file=sys.stderr)
        return [REPORT]


def show(record: dict[str, Any]) -> None:
    """A table of the groups, sentences and warnings, in 80 columns."""
    from rich.markup import escape

    console = open_console(soft_wrap=True)
    console.print(f"[bold]best models of {record['budget']:.3g} training FLOPs[/bold]")
    console.print(models(record["groups"]))
    for line in [*saved(record), *served(record), *ratios(record)]:
        console.print(escape(wrapped(line, console.width)))
    for line in record["warnings"]:
        console.print(
            "[yellow]warning:[/yellow]" + escape(wrapped(f"warning: {line}", console.width))[len("warning:") :]
        )


def wrapped(line: str, width: int) -> str:
    """A sentence in lines, those after the first indented."""
    import textwrap

    return textwrap.fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def models(groups: dict[str, Any]) -> Any:
    """The best model of each group."""
    from rich.table import Table

    from nativerank.cli.plan_table import count

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("", "N", "interval", "tokens", "tokens/N", "loss", "N by"):
        table.add_column(name, justify="left" if name in ("", "N by") else "right", no_wrap=True)
    for name, row in groups.items():
        span = row["params_interval"]
        shown = "" if span is None else f"{count(span[0])} .. {count(span[1])}"
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        cells = (count(row["params"]), shown, count(row["tokens"]), f"{row['tokens_per_param']:.3g}", loss)
        table.add_row(name, *cells, row["source"])
    return table


def percent(share: float, span: Sequence[float] | None = None) -> str:
    """A share, with its interval; what a wild extrapolation gives is not written out."""

    def shown(value: float) -> str:
        return f"{100 * value:.0f}" if value > -10 else "below -1000"

    return f"{shown(share)}%" + ("" if span is None else f" ({shown(span[0])} .. {shown(span[1])}%)")


def saved(record: dict[str, Any]) -> list[str]:
    """What low rank saves at inference, here and far beyond."""
    found = record["saving"]
    if not found:
        return ["There is no dense and low-rank group to compare." if record["groups"] else ""]
    paper, curve = found["paper"], found["curve"]
    here, at_last = percent(found["at_budget"], found["interval"]), percent(curve["best"][-1], curve["band"][-1])
    return [
        f"{record['lowrank']} against {record['dense']}: {here} fewer parameters in its best model, which is what a "
        "served token saves (2 N FLOPs)",
        f"EXTRAPOLATED by {found['decades_beyond']:.1f} decades beyond the last budget, to 1e26 FLOPs: {at_last}",
        f"the paper's exponents, 0.479 against 0.49, with equal prefactors save {percent(paper['at_last'])} there; "
        f"laws that meet at 2.2e18 FLOPs save {percent(paper['at_last_if_meeting_at_2.2e18'])}; for 50% they must "
        f"meet at {paper['half_if_meeting_at']:.2g} FLOPs",
    ]


def served(record: dict[str, Any]) -> list[str]:
    """Training and serving together, and the break-even."""
    found = record["serving"]
    if not found:
        return []
    from nativerank.cli.plan_table import count

    lines = [
        f"cheapest models for a loss of {found['loss']:.4f} with {count(found['served'])} tokens served "
        "(parametric laws):"
    ]
    for name in ("dense", "lowrank"):
        if row := found[name]:
            lines.append(
                f"  {record[name]}: N {count(row['params'])}, {count(row['tokens'])} tokens; training "
                f"{row['train_flops']:.3g} + serving {row['serve_flops']:.3g} = {row['total_flops']:.3g} FLOPs"
            )
    even = found["break_even"]
    if even and even["tokens"] is None:
        lines.append(f"  break-even: none; {record[even['before']]} costs less, served or not")
    elif even:
        lines.append(
            f"  break-even at {even['tokens']:.3g} served tokens: below them {record[even['before']]} costs less, "
            f"above them {record[even['after']]}"
        )
        lines += [f"  and the other way round again from {again:.3g} on" for again in even["again"]]
    return lines


def ratios(record: dict[str, Any]) -> list[str]:
    """The best rank ratios, where a law with rank was fitted."""
    return [f"{m}: best rank ratio {row['rank_ratio']:.3g}" for m, row in record["best_ratio"].items()]
