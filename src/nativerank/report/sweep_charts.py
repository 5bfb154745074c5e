"""A scaling sweep as charts and tables: parabolas, laws, the best ratio, the saving at inference, all cells.

From the records of `scaling fit` and `scaling report` alone, as the figures of `scaling_plots`.
"""

from typing import Any

import numpy as np

from nativerank.report.charts import Chart, Column, Section, Table, Trace, band, color_of, dots, layout, line, span
from nativerank.report.group_charts import cell, setting
from nativerank.report.scaling_plots import BUDGETS, PUBLISHED, predicted

SAVED = "#d1495b"


def sweep_section(
    name: str, found: dict[str, Any] | None, decided: dict[str, Any] | None, cells: list[dict[str, Any]], id: str
) -> Section:
    """Everything about a sweep.

    Args:
        found: of `scaling fit`; None where nothing was fitted. decided: of `scaling report`, if both kinds ran.
        cells: rows of results.jsonl.
    """
    section = Section(id, name)
    if found is None:
        section.notes.append("Not fitted yet: nativerank scaling fit does it.")
    else:
        section.notes += warnings(found)
        groups = found["groups"]
        iso = {name: group for name, group in groups.items() if group["isoflop"]}
        section.charts += [parabolas(n, g, f"{id}-isoflop-{i}") for i, (n, g) in enumerate(iso.items())]
        if iso:
            section.charts += [frontier(iso, key, f"{id}-{key}") for key in ("params", "tokens")]
        laws = {name: group for name, group in groups.items() if group["parametric"]}
        if laws:
            section.charts.append(residuals(laws, f"{id}-residuals"))
        if found["surface"]:
            section.charts.append(best_ratio(found["surface"], f"{id}-ratio"))
        section.tables.append(minimum_table(iso, f"{id}-minima"))
        section.tables.append(law_table(groups, f"{id}-laws"))
    if decided and decided["saving"]:
        section.charts.append(saving(decided, f"{id}-saving"))
    if cells:
        section.tables.append(cell_table(cells, f"{id}-cells"))
    return section


def warnings(found: dict[str, Any]) -> list[str]:
    """Of the fit and of its groups."""
    parts = [*found["groups"].items(), *(found["surface"] or {}).items()]
    return [*found.get("warnings", []), *(f"{name}: {text}" for name, part in parts for text in part["warnings"])]


def parabolas(name: str, group: dict[str, Any], id: str) -> Chart:
    """Runs as dots, a parabola per budget, minima as rings."""
    data: list[Trace] = []
    used = []
    for i, row in enumerate(group["isoflop"]["profiles"]):
        color, shown = BUDGETS[i % len(BUDGETS)], f"{row['flops']:.3g} FLOPs"
        runs = [run for run in group["curves"]["runs"] if run["budget"] == row["flops"]]
        data.append(dots(shown, [r["params"] for r in runs], [r["loss"] for r in runs], color, legendgroup=shown))
        hidden: dict[str, Any] = {"legendgroup": shown, "showlegend": False}
        for curve in group["curves"]["isoflop"]["profiles"]:
            if curve["flops"] == row["flops"]:
                data.append(line(shown, curve["params"], curve["loss"], color, **hidden))
        if row["params"] is not None and not row["fault"]:
            used.append(row)
            ring = dots(f"best of {shown}", [row["params"]], [row["loss"]], color, **hidden)
            data.append(ring | {"marker": {"color": color, "size": 13, "symbol": "circle-open"}})
    best = "; ".join(f"{row['params']:.3g} parameters at {row['flops']:.3g} FLOPs" for row in used)
    losses = [run["loss"] for run in group["curves"]["runs"]]
    margin = 0.05 * (max(losses) - min(losses))
    shape = layout("nats per token", "parameters N", log="x")
    shape["yaxis"]["range"] = [min(losses) - margin, max(losses) + margin]
    return Chart(id, f"IsoFLOP: {name}", f"Best: {best}." if best else "No minimum.", data, shape)


def frontier(groups: dict[str, Any], key: str, id: str) -> Chart:
    """Best size or tokens against compute, with bands, a decade beyond the runs; and the slopes of the paper."""
    data: list[Trace] = []
    texts = []
    for i, (name, group) in enumerate(groups.items()):
        iso, curve = group["isoflop"], group["curves"]["isoflop"][key]
        used = [row for row in iso["profiles"] if row["params"] is not None and not row["fault"]]
        last = 10 * max(row["flops"] for row in used)
        there = [k for k, flops in enumerate(curve["flops"]) if flops <= last]
        flops = [curve["flops"][k] for k in there]
        bands = [curve["band"][k] for k in there]
        if all(bands):
            data += band(flops, [b[0] for b in bands], [b[1] for b in bands], color_of(i), legendgroup=name)
        data.append(line(name, flops, [curve["best"][k] for k in there], color_of(i), legendgroup=name))
        hidden: dict[str, Any] = {"legendgroup": name, "showlegend": False}
        data.append(dots(name, [row["flops"] for row in used], [row[key] for row in used], color_of(i), **hidden))
        letter = {"params": "n", "tokens": "d"}[key]
        interval = iso[f"{letter}_interval"]
        words = f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
        texts.append(f"{name}: exponent {iso[f'{letter}_exponent']:.3g}{words}")
        if i == 0:
            x, first = [curve["flops"][0], 10 * curve["flops"][0]], 0.6 * curve["best"][0]
            for kind, (exponent, dash) in PUBLISHED.items():
                slope = exponent if key == "params" else 1 - exponent
                y = [first, first * 10**slope]
                look = {"dash": {":": "dot", "--": "dash"}[dash]}
                data.append(line(f"paper's slope, {kind}: {slope:.3g}", x, y, "#888888", **look))
    title = {"params": "Best model size", "tokens": "Best number of tokens"}[key]
    unit = {"params": "parameters N", "tokens": "tokens D"}[key]
    return Chart(id, title, "; ".join(texts) + ".", data, layout(unit, "training FLOPs C", log="xy"))


def residuals(groups: dict[str, Any], id: str) -> Chart:
    """How far each run lies from the parametric law of its group."""
    data: list[Trace] = []
    worst = 0.0
    for i, (name, group) in enumerate(groups.items()):
        runs = group["curves"]["runs"]
        fitted = [predicted(group["parametric"], run) for run in runs]
        errors = 100 * np.log(np.array([run["loss"] for run in runs]) / np.array(fitted))
        worst = max(worst, float(np.abs(errors).max()))
        data.append(dots(name, fitted, errors, color_of(i)))
    text = f"E + A/N^alpha + B/D^beta against what was measured: at most {worst:.2g}% apart."
    shape = layout("measured above the law (%)", "loss by the law (nats per token)")
    return Chart(id, "The parametric law", text, data, shape)


def best_ratio(surfaces: dict[str, Any], id: str) -> Chart:
    """The best rank ratio of every budget."""
    data, texts = [], []
    for i, (method, surface) in enumerate(surfaces.items()):
        rows = surface["best"]
        best = [row["rank_ratio"] for row in rows]
        spans = [row["rank_interval"] or [row["rank_ratio"]] * 2 for row in rows]
        trace = line(method, [row["flops"] for row in rows], best, color_of(i), mode="lines+markers")
        up, down = ([max(0.0, s * (e[k] - b)) for b, e in zip(best, spans, strict=True)] for k, s in ((1, 1), (0, -1)))
        data.append(trace | {"error_y": {"type": "data", "symmetric": False, "array": up, "arrayminus": down}})
        texts.append(f"{method}: {span(best)}")
    return Chart(id, "Best rank ratio", "; ".join(texts) + ".", data, layout("rank ratio", "training FLOPs C", log="x"))


def saving(decided: dict[str, Any], id: str) -> Chart:
    """Fewer parameters at inference, with its interval; dashed beyond the runs."""
    found = decided["saving"]
    curve, last = found["curve"], found["last_budget"]
    flops, best = curve["flops"], [100 * s for s in curve["best"]]
    here = sum(c <= last for c in flops)
    data: list[Trace] = []
    if all(curve["band"]):
        low, high = ([100 * b[k] for b in curve["band"]] for k in (0, 1))
        data += band(flops, low, high, SAVED)
    data.append(line("this sweep", flops[:here], best[:here], SAVED, width=2))
    data.append(line("extrapolated", flops[max(0, here - 1) :], best[max(0, here - 1) :], SAVED, dash="dash"))
    paper = found["paper"]
    data.append(line(paper["label"], paper["flops"], [100 * s for s in paper["saving"]], "#888888", dash="dot"))
    at, interval = 100 * found["at_budget"], found["interval"]
    words = f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f}%)" if interval else ""
    text = f"{decided['lowrank']} against {decided['dense']} at {decided['budget']:.3g} FLOPs: {at:.0f}%{words}."
    shape = layout("fewer parameters (%)", "training FLOPs C", log="x")
    shape["yaxis"]["range"] = [max(-100.0, min(-5.0, 1.1 * min(best))), 100]
    return Chart(id, "Saving at inference", text, data, shape, wide=True)


def minimum_table(groups: dict[str, Any], id: str) -> Table:
    """The best size of every budget."""
    names = ("budget", "sizes", "best N", "low", "high", "tokens", "tokens/N", "loss")
    columns = [Column("group"), *[Column(name, True) for name in names], Column("fault")]
    rows = []
    for name, group in groups.items():
        for row in group["isoflop"]["profiles"]:
            low, high = row["params_interval"] or (None, None)
            ratio = row["tokens"] / row["params"] if row["params"] else None
            values = [(row["flops"], ".3g"), (row["sizes"], "d"), (row["params"], ",.0f"), (low, ",.0f")]
            values += [(high, ",.0f"), (row["tokens"], ",.0f"), (ratio, ".3g"), (row["loss"], ".4f")]
            rows.append([(name, name), *[cell(*pair) for pair in values], (row["fault"] or "", row["fault"] or "")])
    return Table(id, "Minima", columns, rows)


def law_table(groups: dict[str, Any], id: str) -> Table:
    """Exponents and constants with their intervals."""
    columns = [Column("group"), Column("law"), Column("constant")]
    columns += [Column(name, True) for name in ("value", "low", "high")]
    rows = []
    for name, group in groups.items():
        for kind in ("isoflop", "parametric"):
            part = group[kind] or {}
            for key in ("n_exponent", "d_exponent", "E", "A", "B", "alpha", "beta"):
                if key in part:
                    spans = part.get("intervals", {}).get(key) or part.get(key.replace("exponent", "interval"))
                    low, high = spans if isinstance(spans, list) else (None, None)
                    numbers = [cell(value, ".4g") for value in (part[key], low, high)]
                    rows.append([(name, name), (kind, kind), (key, key), *numbers])
    return Table(id, "Laws", columns, rows)


def cell_table(cells: list[dict[str, Any]], id: str) -> Table:
    """Every run of the sweep."""
    names = ("budget", "parameters", "tokens", "lr", "validation loss", "seconds")
    columns = [Column("group"), Column("size"), Column("rank ratio", True)]
    columns += [*[Column(name, True) for name in names], Column("outcome")]
    rows = []
    for run in cells:
        what = next((f"{key}: {run[key]}" for key in ("error", "diverged") if key in run), "finished")
        params = (run.get("params") or {}).get("total")
        row = [(str(run.get("method")),) * 2, (str(run.get("size")),) * 2, setting(run.get("rank_ratio"))]
        row += [cell(run.get("budget"), ".3g"), cell(params, ",.0f"), cell(run.get("tokens"), ",.0f")]
        row += [setting(run.get("lr")), cell(run.get("val_loss"), ".4f"), cell(run.get("seconds"), ",.0f")]
        rows.append([*row, (what, what)])
    return Table(id, "All runs", columns, rows)
