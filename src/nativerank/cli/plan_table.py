"""How a plan is shown: low rank beside its dense twin, in 80 columns."""

from collections.abc import Callable
from typing import Any

from nativerank.terminal import WIDTH
from nativerank.terminal import console as open_console

LABELS = {"owned_copies": "  of which owned weights"}
Cell = Callable[[dict[str, Any]], str]
VERDICTS = {"will_not_pay": "will not pay", "pays_little": "pays little", "saves_less": "saves less here"}


def show_plan(plan: dict[str, Any]) -> None:
    """Prints the table and the sentences below it."""
    from rich.markup import escape

    console = open_console(width=WIDTH)
    s, device = plan["settings"], plan["device"]
    grid = s["replicas"] * s["shards"]
    console.print(
        escape(
            f"{plan['model']} with {plan['method']} on {grid} x {device['name']}: {several(s['steps'], 'step')} of "
            f"{s['tokens_per_step']:,} tokens, {several(s['passes'], 'pass')} of {s['sequences_per_pass']} x "
            f"{s['context']} per process ({several(s['replicas'], 'replica')} x {several(s['shards'], 'shard')}), "
            f"recompute {s['recompute']}"
        )
    )
    console.print(_table(plan))
    for line in sentences(plan):
        console.print(escape(line))


def sentences(plan: dict[str, Any]) -> list[str]:
    """What the figures mean, one sentence each."""
    device, largest, memory = plan["device"], plan["largest"], plan["device"]["memory_bytes"]
    fits = f"fits: {gigabytes(plan['bytes']['peak'])} of {gigabytes(memory)} per device"
    lines = [plan["change"] or fits, batch_line(largest)]
    if "rank" in largest:
        lines.append(rank_line(largest))
    for key, words in VERDICTS.items():
        lines += [f"low rank {words}: {reason}" for reason in plan[key]]
    lines.append(f"{device['name']}: {device['source']}. Time is a bound by its peaks, not a forecast.")
    lines.append(f"left out of bytes: {plan['left_out']}.")
    return lines + checked(plan.get("check"))


def checked(found: dict[str, Any] | None) -> list[str]:
    """What two real steps showed, if they were made."""
    if found is None:
        return []
    peak, beyond, speed = (found[name] for name in ("peak_bytes", "beyond_base_bytes", "tokens_per_second"))
    return [
        f"checked by {found['steps']} real steps: peak {gigabytes(peak['predicted'])} predicted, "
        f"{gigabytes(peak['measured'])} measured, of which {gigabytes(found['base_bytes'])} is the process without a "
        f"model; without that {gigabytes(beyond['predicted'])} and {gigabytes(beyond['measured'])}",
        f"with what the allocator keeps of freed memory, as in a run: {gigabytes(found['kept_peak_bytes'])}",
        f"tokens per second: {count(speed['predicted'])} at most, {count(speed['measured'])} measured",
    ]


def batch_line(largest: dict[str, Any]) -> str:
    """The batch that a run of as many sequences per step takes; and how many sequences would fit."""
    fits = f"up to {several(largest['sequences'], 'sequence')} of a pass fit"
    if not largest["batch_size"]:
        return f"no train.batch_size fits that keeps the sequences of a step ({fits})"
    batch = f"--train.batch_size {largest['batch_size']} --train.accumulation {largest['accumulation']}"
    return f"largest batch of a process with the sequences of this step: {batch} ({fits})"


def rank_line(largest: dict[str, Any]) -> str:
    """The largest rank at the planned batch."""
    if not largest["rank"]:
        return f"no {largest['rank_key']} fits at this batch"
    limit = " (any)" if largest["rank"] == largest["rank_limit"] else ""
    return f"largest {largest['rank_key']} that fits at this batch: {largest['rank']}{limit}"


def _table(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    dense = plan.get("dense")
    table = Table(box=None, padding=(0, 2), show_header=dense is not None)
    table.add_column("")
    for name in (plan["method"], *([dense["method"], "ratio"] if dense else [])):
        table.add_column(name, justify="right")
    for label, value, shown in rows(plan):
        if label is None:
            table.add_row("")
            continue
        own = value(plan)
        cells = [shown(own)]
        if dense:
            twin = value(dense)
            cells += [shown(twin), f"{own / twin:.2f}" if twin else "-"]
        table.add_row(label, *cells)
    return table


def rows(plan: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """(label, figure of one side, how it is written); None for an empty line."""
    token = lambda key: lambda p: p["flops"]["per_token"][key]  # noqa: E731
    forward = lambda key: lambda p: p["flops"]["per_token"]["of_forward"][key]  # noqa: E731
    empty: tuple[Any, Any, Any] = (None, None, None)
    components = [
        (LABELS.get(name, name), lambda p, name=name: p["bytes"][name], gigabytes)
        for name in plan["bytes"]
        if name not in ("peak", "logits", "buffers") and plan["bytes"][name]
    ]
    cost = [("cost of the run", lambda p: p["time"]["cost"], amount)] if "cost" in plan["time"] else []
    return [
        ("parameters", lambda p: p["params"]["total"], count),
        ("without embeddings", lambda p: p["params"]["non_embedding"], count),
        empty,
        ("FLOPs per token, exact", token("exact"), count),
        ("  forward", token("forward"), count),
        ("    of which attention", forward("attention"), count),
        ("    of which head", forward("head"), count),
        ("  made again, not in exact", token("recomputed"), count),
        ("FLOPs per token, 6ND", token("6nd"), count),
        ("optimizer's products per step", lambda p: p["flops"]["optimizer_per_step"], count),
        ("run, exact", lambda p: p["flops"]["run"]["exact"], count),
        ("run, 6ND", lambda p: p["flops"]["run"]["6nd"], count),
        empty,
        *components,
        ("peak bytes per process", lambda p: p["bytes"]["peak"], gigabytes),
        ("  of which logits", lambda p: p["bytes"]["logits"], gigabytes),
        empty,
        ("seconds per step, at least", lambda p: p["time"]["seconds_per_step"], "{:.3g}".format),
        ("  of which optimizer", lambda p: p["time"]["optimizer_seconds"], "{:.3g}".format),
        ("tokens per second, at most", lambda p: p["time"]["tokens_per_second"], count),
        ("MFU at that speed", lambda p: p["time"]["mfu"], "{:.0%}".format),
        ("hours of the run", lambda p: p["time"]["hours"], amount),
        *cost,
    ]


def count(number: float) -> str:
    """1234567 -> 1.23M, and from 10^15 on 1.23e+15."""
    if number >= 1e15:
        return f"{number:.3g}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def amount(number: float) -> str:
    """Hours or money, with three digits at least."""
    return f"{number:,.2f}" if number >= 1 else f"{number:.3g}"


def several(number: int, name: str) -> str:
    """1 pass, 2 passes."""
    ending = "es" if name.endswith("s") else "s"
    return f"{number:,} {name}" + ("" if number == 1 else ending)


def gigabytes(size: float) -> str:
    """Bytes in GB, or in MB below one."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
