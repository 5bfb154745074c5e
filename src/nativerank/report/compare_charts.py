"""A comparison (`compare.json`) as charts and tables: curves of the arms at their best, rates, all cells."""

from typing import Any

import numpy as np

from nativerank.experiments.arms import COORDINATES
from nativerank.experiments.table import CAVEATS, difference, notes
from nativerank.report.charts import Chart, Column, Section, Table, Trace, color_of, dash_of, dots, layout, line
from nativerank.report.group_charts import cell, setting
from nativerank.report.plots import rate_lines


def comparison_section(name: str, record: dict[str, Any], id: str) -> Section:
    """Everything that a comparison found.

    Args:
        name: for an error. record: of compare.json, or one of benchmarks/results.

    Raises:
        ValueError: the record is not one that `compare` wrote.
    """
    try:
        return section_of(record, id)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} is no comparison that `nativerank compare` wrote ({what})") from None


def section_of(record: dict[str, Any], id: str) -> Section:
    """The same of a record that is whole."""
    charts = [curves(record, f"{id}-curves", flops) for flops in (False, True)] if record["curves"] else []
    charts += rates(record, f"{id}-rates")
    lines = record.get("study", {}).get("lines", [])
    return Section(
        id,
        record["title"],
        notes=[*lines, CAVEATS[record["budget"]]],
        lead=[arm_table(record, f"{id}-arms")],
        charts=charts,
        tables=[cell_table(record, f"{id}-cells")],
    )


def curves(record: dict[str, Any], id: str, flops: bool) -> Chart:
    """Training loss as lines, validations as dots, against tokens or FLOPs."""
    data: list[Trace] = []
    for i, (name, curve) in enumerate(record["curves"].items()):
        unit = curve["flops_per_token"] if flops else 1.0
        train, checked = (np.array(curve[key], dtype=float).reshape(-1, 2) for key in ("train", "validation"))
        data.append(line(name, unit * train[:, 0], train[:, 1], color_of(i), dash=dash_of(i), legendgroup=name))
        hidden: dict[str, Any] = {"legendgroup": name, "showlegend": False}
        data.append(dots(name, unit * checked[:, 0], checked[:, 1], color_of(i), **hidden))
    what = "training FLOPs" if flops else "tokens"
    text = f"Loss against {what}, every arm at its best point: lines training, dots validation."
    name = f"{id}-{'flops' if flops else 'tokens'}"
    return Chart(name, f"Loss against {what}", text, data, layout("nats per token", what))


def rates(record: dict[str, Any], id: str) -> list[Chart]:
    """Validation loss against the matrix rate, where several ran."""
    lines = {name: points for name, points in rate_lines(record).items() if len(points) > 1}
    if not lines:
        return []
    data = [
        line(name, [x for x, _ in points], [y for _, y in points], color_of(i), dash=dash_of(i), mode="lines+markers")
        for i, (name, points) in enumerate(lines.items())
    ]
    text = "Validation loss of the first seed against the matrix rate, other coordinates at their best."
    return [Chart(id, "Rates", text, data, layout("nats per token", "matrix learning rate", log="x"))]


def arm_table(record: dict[str, Any], id: str) -> Table:
    """A row per arm, best first."""
    columns = [Column("arm")] + [Column(key.rpartition(".")[2], True) for key in COORDINATES]
    names = ("steps", "parameters", "FLOPs", "n", "validation loss", "sd", "low", "high", "seconds", "diverged")
    columns += [Column(name, True) for name in names] + [Column("against the first (95%)", True), Column("notes")]
    rows = []
    ranked = sorted(record["arms"], key=lambda arm: (arm["group"], arm["mean"] is None, arm["mean"] or 0.0))
    for arm in ranked:
        best = arm["best"] or {}
        low, high = mean_interval(arm)
        name = f"{arm['group']}: {arm['label']}" if arm["group"] else arm["label"]
        found = arm["difference"]
        row = [(name, name), *[setting(best.get(key)) for key in COORDINATES], cell(arm["steps"], ",.0f")]
        row += [cell(arm["parameters"]["total"], ",.0f"), cell(arm["flops"], ".3g"), cell(arm["n"], "d")]
        row += [cell(arm["mean"], ".4f"), cell(arm["sd"], ".4f"), cell(low, ".4f"), cell(high, ".4f")]
        row += [cell(arm["seconds"], ".0f"), cell(arm["diverged"], "d")]
        row += [(difference(arm), found["mean"] if found else None), (noted(arm),) * 2]
        rows.append(row)
    note = "low and high: Student's 95% interval of the mean over seeds. Differences are paired by seed."
    return Table(id, "Arms", columns, rows, note)


def noted(arm: dict[str, Any]) -> str:
    """Notes on an arm; records of earlier versions know less."""
    return notes({"failed": 0, "refused": 0, "refused_steps": [], "refused_steps_at_best": 0, "edges": []} | arm)


def mean_interval(arm: dict[str, Any]) -> tuple[float | None, float | None]:
    """Student's 95% interval of the mean over seeds; nothing of one seed."""
    if not arm["n"] or arm["n"] < 2 or arm["sd"] is None:
        return None, None
    from scipy.stats import t

    half = float(t.ppf(0.975, arm["n"] - 1)) * arm["sd"] / arm["n"] ** 0.5
    return arm["mean"] - half, arm["mean"] + half


def cell_table(record: dict[str, Any], id: str) -> Table:
    """Every run."""
    keys = [key for key in COORDINATES if any(key in run for run in record["cells"])]
    columns = [Column("arm"), *[Column(key.rpartition(".")[2], True) for key in keys]]
    columns += [Column(name, True) for name in ("seed", "validation loss", "seconds")] + [Column("outcome")]
    rows = []
    for run in record["cells"]:
        what = next((f"{key}: {run[key]}" for key in ("diverged", "error", "refused") if run.get(key)), "finished")
        row = [(run["method"],) * 2, *[setting(run.get(key)) for key in keys], cell(run["seed"], "d")]
        rows.append([*row, cell(run.get("val_loss"), ".4f"), cell(run.get("seconds"), ".0f"), (what, what)])
    return Table(id, "All runs", columns, rows)
