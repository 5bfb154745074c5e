"""nativerank scaling plan: the cells of a sweep, before any of them runs.

nativerank scaling plan --grid miniature
nativerank scaling plan --grid spectron --on h100-sxmx8 --price 3
nativerank scaling plan --family pocket --widths 64,96,128 --budgets 1e12,3e12 --methods spectron,dense-muon
"""

from typing import Any

from nativerank.cli.output import STDOUT, check_json, write_json
from nativerank.cli.scaling_design import design_parser, read_design
from nativerank.terminal import console as open_console

DESCRIPTION = """Budgets x sizes x methods x rates as a table of runs: parameters, tokens, steps, rate, FLOPs by both
conventions; with --on the time on a device. Nothing is trained and no data are read."""
EXAMPLE = """examples:
  nativerank scaling plan --grid miniature
  nativerank scaling plan --grid spectron --on h100-sxmx8 --price 3
  nativerank scaling plan --family pocket --widths 64,96,128 --budgets 1e12,3e12 --methods spectron,dense-muon
  nativerank scaling plan --sizes spectron-s,spectron-m --budgets 1e19 --methods spectron --ratios 0.125,0.25,0.5 --json

Budgets are 6 N D with N all parameters, or exact FLOPs (--convention exact). Times are a bound by the device's peaks.
"""


def add_flags(parser: Any) -> None:
    """What a plan takes besides the flags of a sweep."""
    group = parser.add_argument_group("plan")
    group.add_argument("--on", metavar="DEVICE[xN]", help="also the time on this device, see nativerank plan")
    group.add_argument("--table", metavar="FILE", help="YAML file with more devices")
    group.add_argument("--price", type=float, metavar="P", help="of a device hour, in any currency")
    group.add_argument("--efficiency", type=float, default=1.0, help="share of the roofline to reckon with")


def parse(argv: list[str]) -> tuple[Any, Any, Any]:
    """(design, flags, --out), as `read_design`."""
    return read_design(argv, design_parser("plan", DESCRIPTION, EXAMPLE, "[--grid NAME] ", add_flags))


def run(argv: list[str]) -> int:
    """Plans and shows."""
    design, flags, out = parse(argv)
    check_json(flags.json)
    if flags.quiet and flags.json is None:
        raise ValueError("--quiet leaves nothing of a plan; add --json, or drop it")
    if flags.on is None and (flags.table is not None or flags.price is not None or flags.efficiency != 1.0):
        raise ValueError("--table, --price and --efficiency belong to --on DEVICE")
    if design is None:
        design = stored(out)
    from nativerank.scaling.cells import plan_cells

    record = planned_record(design, plan_cells(design), flags)
    if not flags.quiet and flags.json != STDOUT:
        show(record)
    write_json(record, flags.json)
    return 0


def stored(out: Any) -> Any:
    """The design of the sweep in a folder.

    Raises:
        ValueError: no folder was named, or it holds none.
    """
    from nativerank.scaling.design import Design, read_sweep

    if out is None:
        raise ValueError("say what to sweep: --grid miniature, or --sizes ... --budgets ... --methods ...; see --help")
    sweep = read_sweep(out)
    if sweep is None:
        raise ValueError(f"{out} holds no sweep yet; say what to sweep: --grid miniature, or --sizes ... --budgets ...")
    return Design.from_dict(sweep["design"])


def planned_record(design: Any, cells: list[Any], flags: Any) -> dict[str, Any]:
    """The plan for JSON: `design`, `cells` in the order of --cell, and totals; hours where a device is named."""
    rows = [{"number": number, **planned.row()} for number, planned in enumerate(cells)]
    totals: dict[str, Any] = {"runs": len(rows)}
    totals["flops"] = {key: sum(row["flops"][key] for row in rows) for key in ("6nd", "exact")}
    if flags.on is not None:
        from nativerank.plan.make import Request, chosen_device
        from nativerank.scaling.cells import seconds_on

        request = Request(flags.on, flags.table, flags.price, flags.efficiency, search=False)
        device, count = chosen_device(request)
        for row, seconds in zip(rows, seconds_on(cells, request), strict=True):
            row["hours"] = seconds / 3600
        totals |= {"device": device.name, "devices": count or 1, "hours": sum(row["hours"] for row in rows)}
        if device.price_per_hour is not None:
            totals["cost"] = totals["hours"] * totals["devices"] * device.price_per_hour
    return {"design": design.as_dict(), "cells": rows, "totals": totals}


def show(record: dict[str, Any]) -> None:
    """A table for each method and rank ratio, in 80 columns, and a line with the sums."""
    from rich.markup import escape

    console = open_console(soft_wrap=True)
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in record["cells"]:
        groups.setdefault((row["method"], row["rank_ratio"]), []).append(row)
    for (method, ratio), rows in groups.items():
        title = f"{method}{'' if ratio is None else f', rank ratio {ratio:g}'}, {family_of(rows)}: {len(rows)} runs"
        console.print(escape(title))
        console.print(table(rows, record["design"]))
    for line in sentences(record):
        console.print(escape(line))


def table(rows: list[dict[str, Any]], design: dict[str, Any]) -> Any:
    """One group's runs; FLOPs by the convention that is not the budgets', which are the other one."""
    from rich.table import Table

    from nativerank.cli.plan_table import count as short

    total, by_exact = design["count"] == "total", design["convention"] == "exact"
    shown, rest = ("total", "non_embedding") if total else ("non_embedding", "total")
    flops = "6nd" if by_exact else "exact"
    timed, several = "hours" in rows[0], len({row["seed"] for row in rows}) > 1
    found = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    columns = ["budget", "size", "N", "non-emb" if total else "all", "tokens", "steps", "lr", flops]
    for name in columns + ["seed"] * several + ["time"] * timed:
        found.add_column(name, justify="left" if name == "size" else "right", no_wrap=True)
    names, before = short_names([row["size"] for row in rows]), None
    for row in rows:
        budget = f"{row['budget']:.3g}"
        sizes = [row["params"][shown], row["params"][rest], row["tokens"]]
        cells = ["" if budget == before else budget, names[row["size"]], *map(short, sizes), f"{row['steps']:,}"]
        cells += [f"{row['lr']:.3g}", f"{row['flops'][flops]:.2e}", *([str(row["seed"])] * several)]
        found.add_row(*cells, *([duration(row["hours"] * 3600)] if timed else []))
        before = budget
    return found


def family_of(rows: list[dict[str, Any]]) -> str:
    """The presets that sizes belong to."""
    return ", ".join(dict.fromkeys(row["size"].partition("@")[0] for row in rows))


def short_names(sizes: list[str]) -> dict[str, str]:
    """Sizes without the family that all of them share."""
    families = {size.partition("@")[0] for size in sizes}
    return {size: size.partition("@")[2] if len(families) == 1 and "@" in size else size for size in sizes}


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s"


def sentences(record: dict[str, Any]) -> list[str]:
    """What the figures mean."""
    design, totals = record["design"], record["totals"]
    n = "all parameters" if design["count"] == "total" else "parameters without embedding and head"
    flops = ", ".join(f"{value:.3g} {name}" for name, value in totals["flops"].items())
    lines = [
        f"{totals['runs']} runs, {flops} FLOPs together. Budgets by the convention {design['convention']}; N: {n}. "
        "6nd is 6 N tokens; exact is rank-aware, attention and head included.",
    ]
    if "hours" in totals:
        cost = f", cost {totals['cost']:.4g}" if "cost" in totals else ""
        where = f"{totals['devices']} x {totals['device']}"
        lines.append(f"On {where}, one run after the other: {duration(totals['hours'] * 3600)} at least{cost}.")
    return lines
