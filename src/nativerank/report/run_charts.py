"""Charts of one run: loss, rates, speed, memory; and what only its events say."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nativerank.report.charts import COLORS, Chart, Column, Table, Trace, color_of, label, layout, line, span
from nativerank.report.runs import Row, Run, number
from nativerank.report.thin import MEDIANS, medians, short

TRAINING, VALIDATION, FAINT, ALARM = COLORS[0], COLORS[1], "#8fa8bd", "#b3261e"
AXIS_POINTS = 300
MARKED = 120  # events on a curve; all of them are in the table
EVENTS = {
    "resume": "resumed",
    "ranks": "ranks changed",
    "checkpoint_damaged": "a damaged checkpoint was passed over",
    "interrupted": "interrupted by a signal",
    "tracker_failed": "the tracker failed and was left behind",
    "loss_spike": "loss spike",
    "sigma_spike": "spike of a factor's norm",
    "gradient_not_finite": "gradient not finite",
    "loss_not_finite": "loss not finite",
}


def axes(run: Run) -> dict[str, list[float | None]]:
    """Tokens, FLOPs and hours at some steps, between which all of them are straight lines to the eye.

    Hours are those of the steps alone, undone ones left out; validation and checkpoints are not in them.
    """
    steps = run.axis
    kept = np.unique(np.linspace(0, len(steps) - 1, AXIS_POINTS).round().astype(int)) if len(steps) else np.arange(0)
    found = {"step": steps, "tokens": run.column("tokens"), "flops": run.column("train_flops")}
    found["hours"] = np.nancumsum(run.column("seconds")) / 3600
    return {name: short(values[kept]) for name, values in found.items() if np.isfinite(values).all() and len(values)}


def measured(run: Run, key: str, name: str, color: str = TRAINING, scale: float = 1.0) -> list[Trace]:
    """A number of every step; where there are many, faint and with the median of each stretch before it."""
    values = scale * run.column(key)
    there = np.isfinite(values)
    x, y = run.axis[there], values[there]
    if len(y) <= 2 * MEDIANS:
        return [line(name, x, y, color, run.name)]
    middle = medians(x, y)
    return [
        line(name, x, y, FAINT, run.name, width=1),
        line(f"{name}, median of {len(y) // MEDIANS} steps", *middle, color, run.name, width=2),
    ]


def validations(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """(steps, losses) of the validations on the way and the one at the end."""
    rows = [*run.steps, *([run.end] if run.end else [])]
    found = [(number(row.get("step")), number(row.get("val_loss"))) for row in rows if "val_loss" in row]
    return np.array([a for a, _ in found]), np.array([b for _, b in found])


def loss_charts(run: Run) -> list[Chart]:
    """Loss, and perplexity of the validations."""
    losses, (at, val) = run.column("loss"), validations(run)
    data = measured(run, "loss", "training")
    best = ""
    if len(val):
        data.append(line("validation", at, val, VALIDATION, run.name, mode="lines+markers", width=2))
        best = (
            f" Lowest validation {np.nanmin(val):.4f} at step {at[np.nanargmin(val)]:,.0f}."
            if np.isfinite(val).any()
            else ""
        )
    if run.has("distill_loss"):
        data += measured(run, "distill_loss", "distillation", COLORS[2])
    finite = losses[np.isfinite(losses)]  # a run that diverged ends without one
    text = f"Training loss from {finite[0]:.3f} to {finite[-1]:.3f} nats per token." if len(finite) else ""
    text += best
    charts = [Chart("loss", "Loss", text, data, layout("nats per token"), over_steps=True)]
    if len(val):
        x, y = medians(run.axis, np.exp(losses))
        data = [
            line("training, median", x, y, TRAINING, run.name),
            line("validation", at, np.exp(val), VALIDATION, run.name, mode="lines+markers", width=2),
        ]
        text = f"e^loss of the validations: {span(np.exp(val))}."
        charts.append(Chart("perplexity", "Perplexity", text, data, layout("perplexity", log="y"), over_steps=True))
    return charts


# key -> heading, what y says, factor, logarithmic
FIGURES: dict[str, tuple[str, str, float, bool]] = {
    "grad_norm": ("Gradient norm", "L2 norm before clipping", 1.0, True),
    "tokens_per_second": ("Speed", "tokens per second", 1.0, False),
    "mfu": ("MFU", "% of the bf16 peak", 100.0, False),
    "optimizer_share": ("Share of the optimizer", "% of a step", 100.0, False),
    "peak_memory_bytes": ("Memory", "GB at peak", 1e-9, False),
    "guide_alpha": ("Weight of the dense guide", "alpha", 1.0, False),
}


def figure_charts(run: Run, names: Sequence[str]) -> list[Chart]:
    """One chart for each of these numbers that the run recorded."""
    charts = []
    for key in names:
        if not run.has(key):
            continue
        title, unit, scale, log = FIGURES[key]
        values = scale * run.column(key)
        finite = values[np.isfinite(values)]
        text = f"{unit[0].upper()}{unit[1:]}: {span(finite)}, median {np.median(finite):.4g}."
        data = measured(run, key, title, scale=scale)
        charts.append(Chart(key, title, text, data, layout(unit, log="y" if log else ""), over_steps=True))
    return charts


def rate_chart(run: Run) -> Chart:
    """Both learning rates."""
    data = [
        line(name, run.axis, run.column(key), color, run.name)
        for key, name, color in (("lr", "matrices", COLORS[0]), ("aux_lr", "everything else", COLORS[1]))
        if run.has(key)
    ]
    text = f"Peak of the matrices {np.nanmax(run.column('lr')):.4g}." if run.has("lr") else ""
    return Chart("lr", "Learning rate", text, data, layout("rate"), over_steps=True)


def mark_events(charts: Sequence[Chart], runs: Sequence[Run]) -> list[Chart]:
    """The same charts with a mark on each for what happened in the runs; of several runs in their colours."""
    marks = [marks_of(run, color_of(i) if len(runs) > 1 else ALARM) for i, run in enumerate(runs) if run.events]
    if not marks:
        return list(charts)
    bare = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    return [
        replace(chart, data=[*chart.data, *marks], layout={**chart.layout, "yaxis2": bare})
        if chart.over_steps
        else chart
        for chart in charts
    ]


def marks_of(run: Run, color: str) -> Trace:
    """Triangles along the lower edge, one for each event."""
    shown = run.events if len(run.events) <= MARKED else run.events[:: -(-len(run.events) // MARKED)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "events" if color == ALARM else f"events of {label(run.name)}",
        "x": [number(row.get("step")) for row in shown],
        "y": [0.0] * len(shown),
        "yaxis": "y2",
        "text": [label(described(row)) for row in shown],
        "hoverinfo": "text+x",
        "marker": {"symbol": "triangle-up", "size": 9, "color": color},
        "meta": run.name,
        "cliponaxis": False,
        "showlegend": color == ALARM,
    }


def changes(row: Row) -> dict[str, tuple[float, float]]:
    """module -> (rank before, rank after) of an event that changed ranks; what is no pair of numbers is left out."""
    ranks = row.get("ranks")
    told = ranks.items() if isinstance(ranks, dict) else ()
    found = {m: (number(p[0]), number(p[1])) for m, p in told if isinstance(p, list) and len(p) == 2}
    return {m: pair for m, pair in found.items() if np.isfinite(pair).all()}


def described(row: Row) -> str:
    """An event in a line."""
    event = str(row.get("event"))
    text = EVENTS.get(event, event.replace("_", " "))
    if event == "ranks":
        pairs = list(changes(row).values())
        before, after = (sum(pair[i] for pair in pairs) for i in (0, 1))
        return f"{text}: {len(pairs)} matrices, their sum from {before:,.0f} to {after:,.0f}"
    if event == "resume":
        return f"{text} from {row.get('checkpoint', '?')}"
    if "action" in row:
        text += f": {row['action']}"
    if "rolled_back_to" in row:
        text += f" to step {row['rolled_back_to']}"
    return text if "reason" not in row else f"{text}: {row['reason']}"


def event_table(run: Run) -> Table:
    """Everything that happened."""
    rows = [[(f"{number(r.get('step')):,.0f}", number(r.get("step"))), (described(r),) * 2] for r in run.events]
    return Table("events", "Events", [Column("step", True), Column("what")], rows)


def sample(run: Run) -> list[tuple[str, str]]:
    """What the model wrote at the end."""
    if run.end is None or "sample" not in run.end:
        return []
    return [("Sample", f"{run.end.get('prompt', '')} ...{run.end['sample']}")]
