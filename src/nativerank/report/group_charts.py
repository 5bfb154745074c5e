"""Several runs over one another, and their table."""

from typing import Any

import numpy as np
import yaml

from nativerank.report.charts import Chart, Column, Table, Trace, color_of, dash_of, layout, line
from nativerank.report.run_charts import FIGURES, described, validations
from nativerank.report.runs import Run, number
from nativerank.report.thin import MEDIANS, medians

DRAWN = ("grad_norm", "tokens_per_second", "peak_memory_bytes")
NUMBERS = ("validation loss", "parameters", "tokens", "training FLOPs", "seconds", "events")
NOT_SETTINGS = ("out", "resume", "device")


def overlays(runs: list[Run]) -> list[Chart]:
    """Loss of all, validations of all, and what else is worth a comparison."""
    text = f"Training loss of {len(runs)} runs, the median of each of up to {MEDIANS} stretches."
    data = [trace(i, run, *medians(run.axis, run.column("loss"))) for i, run in enumerate(runs)]
    charts = [Chart("losses", "Training loss", text, data, layout("nats per token"), over_steps=True)]
    data, best = [], []
    for i, run in enumerate(runs):
        x, y = validations(run)
        if np.isfinite(y).any():
            data.append(trace(i, run, x, y, mode="lines+markers"))
            best.append((float(np.nanmin(y)), run.name))
    if data:
        lowest = min(best)
        text = f"Lowest: {lowest[0]:.4f} nats per token, {lowest[1]}."
        charts.append(Chart("validations", "Validation loss", text, data, layout("nats per token"), over_steps=True))
    data = [trace(i, run, run.axis, run.column("lr")) for i, run in enumerate(runs) if run.has("lr")]
    charts.append(Chart("rates", "Learning rate", "Of the matrices.", data, layout("rate"), over_steps=True))
    return charts + [chart for key in DRAWN if (chart := figure_overlay(runs, key))]


def figure_overlay(runs: list[Run], key: str) -> Chart | None:
    """Medians of a number that the runs recorded; None where none did."""
    title, unit, scale, log = FIGURES[key]
    there = [(i, run) for i, run in enumerate(runs) if run.has(key)]
    if not there:
        return None
    data = [trace(i, run, *medians(run.axis, scale * run.column(key))) for i, run in there]
    text = f"The median of each of up to {MEDIANS} stretches."
    return Chart(key, title, text, data, layout(unit, log="y" if log else ""), over_steps=True)


def trace(number: int, run: Run, x: Any, y: Any, **more: Any) -> Trace:
    """A curve of one of several runs."""
    return line(run.name, x, y, color_of(number), run.name, dash=dash_of(number), points=2 * MEDIANS, **more)


def run_table(runs: list[Run]) -> Table:
    """A row a run: how it ended, what it took, and the settings in which they differ."""
    settings = [flat_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for own in settings for key in own))
    told = [own for own in settings if own]
    differing = [key for key in keys if len({repr(own.get(key)) for own in told}) > 1]
    columns = [Column("run"), Column("state")]
    columns += [Column(name, True) for name in NUMBERS]
    columns += [Column(key, all(is_number(own.get(key)) for own in settings)) for key in differing]
    rows = []
    for run, own in zip(runs, settings, strict=True):
        end = run.end or {}
        _, losses = validations(run)
        finite = losses[np.isfinite(losses)]
        counted = end.get("parameters") or run.facts.get("parameters") or {}
        total = counted.get("total") if isinstance(counted, dict) else None
        seconds = number(end.get("seconds")) if end else float(np.nansum(run.column("seconds")))
        tokens = run.column("tokens")
        flops = run.column("train_flops")
        rows.append(
            [
                (run.name, run.name),
                (run.state, run.state),
                cell(finite[-1] if len(finite) else None, ".4f"),
                cell(total, ",.0f"),
                cell(tokens[-1] if len(tokens) else None, ",.0f"),
                cell(flops[-1] if len(flops) else None, ".3g"),
                cell(seconds, ",.0f"),
                cell(len(run.events), "d"),
                *[setting(own.get(key)) for key in differing],
            ]
        )
    return Table("runs", "Runs", columns, rows, "Settings are those in which the runs differ.")


def flat_settings(run: Run) -> dict[str, Any]:
    """Dotted settings of config.yaml that make a difference; none where it cannot be read."""
    found: dict[str, Any] = {}

    def walk(part: Any, prefix: str) -> None:
        for key, value in part.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    try:
        values = yaml.safe_load(run.config)
        walk(values if isinstance(values, dict) else {}, "")
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that is none; a mapping that holds itself
        return {}
    return {key: value for key, value in found.items() if key not in NOT_SETTINGS}


def event_table(runs: list[Run]) -> Table:
    """What happened in all of them."""
    rows = [
        [(run.name, run.name), cell(number(r.get("step")), ",.0f"), (described(r),) * 2]
        for run in runs
        for r in run.events
    ]
    return Table("events", "Events", [Column("run"), Column("step", True), Column("what")], rows)


def cell(value: Any, form: str) -> tuple[str, Any]:
    """(shown, value) of a number; a dash where there is none."""
    if value is None or not np.isfinite(number(value)):
        return "-", None
    return format(int(value) if form == "d" else float(value), form), float(value)


def setting(value: Any) -> tuple[str, Any]:
    """(shown, value) of a setting."""
    if value is None:
        return "-", None
    return (f"{value:g}", value) if is_number(value) else (str(value), str(value))


def is_number(value: Any) -> bool:
    """Whether it is one, or nothing."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
