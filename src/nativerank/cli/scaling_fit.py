"""nativerank scaling fit: the laws that the runs of a sweep follow.

nativerank scaling fit runs/sweep                          # a sweep of ours: table, fit.json and figures in its folder
nativerank scaling fit others.csv --convention 6nd --out fits/others
nativerank scaling fit runs/a runs/b runs/c                # any run folders
"""

import sys
from pathlib import Path
from typing import Any

from nativerank.cli.main import Parser
from nativerank.cli.output import STDOUT, add_json, check_json, write_json
from nativerank.terminal import console as open_console

DESCRIPTION = """IsoFLOP parabolas per budget and the power laws through their minima, the parametric law
L = E + A/N^alpha + B/D^beta, and with three rank ratios or more the law with rank; each with bootstrap intervals."""
EXAMPLE = """examples:
  nativerank scaling fit runs/sweep
  nativerank scaling fit others.csv --convention 6nd --out fits/others
  nativerank scaling fit runs/sweep --approaches isoflop --samples 5000 --json fit.json

A CSV has the columns params,tokens,flops,loss and, if you like, rank_ratio,method,budget,lr,seed,size; a loss of
"diverged" is a run without one. Without --approaches whatever the runs suffice for is fitted.
"""
FIT = "fit.json"
# What the Spectron paper reports (arXiv 2602.12429), and the dense exponents that it quotes.
PUBLISHED = "paper: low rank N ~ C^0.479, D ~ C^0.521; dense 0.49, 0.51"


def make_parser() -> Any:
    """The flags."""
    import argparse

    parser = Parser(
        prog="nativerank scaling fit",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="SWEEP|RUN|FILE.csv", help="folders and tables, fitted together")
    parser.add_argument("--convention", metavar="6nd|exact", help="of the FLOPs (without: the sweep's; a table's: 6nd)")
    parser.add_argument("--count", metavar="total|non_embedding", help="which N folders give (without: the sweep's)")
    parser.add_argument("--approaches", metavar="LIST", help="isoflop,parametric,surface (without: what there is)")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="resamples for intervals")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of their draw")
    parser.add_argument("--level", type=float, default=0.95, metavar="P", help="what intervals shall cover")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"for {FIT} and figures (without: a sweep's own folder)"
    )
    parser.add_argument("--quiet", action="store_true", help="no table")
    add_json(parser)
    return parser


def parse(argv: list[str]) -> Any:
    """The flags."""
    return make_parser().parse_args(argv)


def run(argv: list[str]) -> int:
    """Reads, fits, draws, shows."""
    flags = parse(argv)
    check_json(flags.json)
    found = fitted(flags)
    out = flags.out or own_folder(flags.runs)
    files = [] if out is None else write_files(found, out)
    if not write_json(found, flags.json) and not flags.quiet:
        show(found)
    if files and not flags.quiet:
        print(f"{out}: {', '.join(files)}", file=sys.stderr if flags.json == STDOUT else sys.stdout)
    return 0


def fitted(flags: Any) -> dict[str, Any]:
    """The record of the fit."""
    from nativerank.cli.console import progress
    from nativerank.scaling.fit import fit
    from nativerank.scaling.sources import read_runs
    from nativerank.scaling.sweep import Options

    complaints: list[str] = []
    names = None if flags.approaches is None else tuple(w.strip() for w in flags.approaches.split(",") if w.strip())
    options = Options(names, flags.samples, flags.seed, flags.level)  # checks the names
    runs = read_runs([Path(name) for name in flags.runs], flags.convention, flags.count, complaints.append)
    with progress(flags.quiet) as watch:
        found = fit(runs, options, watch)
    found["warnings"] = complaints + found["warnings"]
    return found


def own_folder(names: list[str]) -> Path | None:
    """The folder of the sweep, if one is all that was given."""
    from nativerank.scaling.design import SWEEP

    folder = Path(names[0])
    return folder if len(names) == 1 and (folder / SWEEP).is_file() else None


def write_files(found: dict[str, Any], out: Path) -> list[str]:
    """fit.json and the figures; their names."""
    import json

    from nativerank.experiments.request import put
    from nativerank.report import plots, scaling_plots

    out.mkdir(parents=True, exist_ok=True)
    put(out / FIT, json.dumps(found, indent=1) + "\n")
    try:
        return [FIT, *(file.name for file in scaling_plots.draw(found, out))]
    except ImportError:
        print(plots.HINT, file=sys.stderr)
        return [FIT]


def show(found: dict[str, Any]) -> None:
    """Tables in 80 columns and the warnings."""
    from rich.markup import escape

    console = open_console(soft_wrap=True)
    for name, group in found["groups"].items():
        console.print(f"[bold]{escape(name)}[/bold]: {group['runs']} runs")
        if group["isoflop"]:
            console.print(profiles(group["isoflop"]))
        for line in laws(group):
            console.print(escape(f"  {line}"))
    for method, surface in (found["surface"] or {}).items():
        console.print(f"[bold]{escape(method)}[/bold], the law with rank: {surface['runs']} runs")
        for line in of_surface(surface):
            console.print(escape(f"  {line}"))
    if any(group["isoflop"] or group["parametric"] for group in found["groups"].values()):
        console.print(escape(PUBLISHED))
    for line in every_warning(found):
        console.print(f"[yellow]warning:[/yellow] {escape(line)}")


def every_warning(found: dict[str, Any]) -> list[str]:
    """All of them, those of a group with its name where there are several."""
    named = len(found["groups"]) > 1
    parts = [*found["groups"].items(), *(found["surface"] or {}).items()]
    return found["warnings"] + [f"{name}: {w}" if named else w for name, part in parts for w in part["warnings"]]


def profiles(isoflop: dict[str, Any]) -> Any:
    """The minimum of each budget."""
    from rich.table import Table

    from nativerank.cli.plan_table import count

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("budget", "sizes", "best N", "interval", "tokens", "tokens/N", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in isoflop["profiles"]:
        head = [f"{row['flops']:.3g}", str(row["sizes"])]
        if row["params"] is None:
            table.add_row(*head, "none")
            continue
        span = row["params_interval"]
        shown = "" if span is None else f"{count(span[0])} .. {count(span[1])}"
        best = f"{count(row['params'])}{'*' if row['fault'] else ''}"
        ratio = f"{row['tokens'] / row['params']:.3g}"
        table.add_row(*head, best, shown, count(row["tokens"]), ratio, f"{row['loss']:.4f}")
    return table


def laws(group: dict[str, Any]) -> list[str]:
    """Exponents and constants with their intervals."""
    lines = []
    iso, law = group["isoflop"], group["parametric"]
    if iso:
        for key, name in (("n", "N"), ("d", "D")):
            exponent = with_interval(iso[f"{key}_exponent"], iso[f"{key}_interval"])
            lines.append(f"IsoFLOP: best {name} = {iso[f'{key}_coefficient']:.3g} C^{exponent}")
        if iso["prediction"]:
            worst = max(abs(row["log_params_error"]) for row in iso["prediction"])
            lines.append(f"each budget from the others: best N off by at most {100 * (2.718281828**worst - 1):.0f}%")
    if law:
        lines.append("parametric: L = E + A / N^alpha + B / D^beta")
        for names in (("E", "alpha", "beta"), ("A", "B")):
            lines.append("  " + ", ".join(f"{n} {with_interval(law[n], law['intervals'][n])}" for n in names))
        n, d = (with_interval(law[f"{k}_exponent"], law[f"{k}_interval"]) for k in "nd")
        lines.append(f"  at C = 6 N D: best N ~ C^{n}, D ~ C^{d}")
        if law["prediction"]:
            worst = max(row["log_loss_error"] for row in law["prediction"])
            lines.append(f"  each budget from the others: losses off by at most {100 * worst:.2g}% on average")
    return lines


def of_surface(surface: dict[str, Any]) -> list[str]:
    """The law with rank: constants, and the best ratio of each budget."""
    names = ("E", "A", "B", "alpha", "beta", "gamma", "kappa")
    lines = [", ".join(f"{n} {surface[n]:.4g}" for n in names)]
    for row in surface["best"]:
        ratio = with_interval(row["rank_ratio"], row["rank_interval"])
        end = "" if row["inside"] else " (an end of those that ran)"
        lines.append(f"{row['flops']:.3g} FLOPs: best rank ratio {ratio}{end}")
    return lines


def with_interval(value: float, span: list[float] | None) -> str:
    """A number and what it may lie between."""
    return f"{value:.3g}" if span is None else f"{value:.3g} ({span[0]:.3g} .. {span[1]:.3g})"
