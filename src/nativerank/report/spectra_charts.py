"""Charts of what probes recorded: norms, steps against their bound, stable rank, orthonormality; maps of all layers.

A colour is a matrix. Of more than SHOWN the first, the middle and the last are drawn and others wait in the legend, of
more than LISTED only some at equal distances: the map has all.
"""

import re
from typing import Any

import numpy as np

from nativerank.report.charts import Chart, Frames, Trace, color_of, label, layout, line, span
from nativerank.report.run_charts import changes
from nativerank.report.runs import Run, number
from nativerank.report.thin import short

SHOWN, LISTED = 3, 9
POINTS = 24_000  # of all spectral curves of a page
CELLS = 60_000  # of all frames of a map
FRAMES = 60
Series = tuple[np.ndarray, np.ndarray]  # steps, values

# key -> heading, what y says, logarithmic
FIGURES: dict[str, tuple[str, str, bool]] = {
    "stable_rank": ("Stable rank", "||W||_F^2 / ||W||_2^2", False),
    "output_change": ("Change of the layer's output in a step", "RMS on a fixed batch", True),
    "orthonormality": ("Orthonormality", "max |Q^T Q - 1|", True),
    "gauge": ("Balance of the factors", "||A|| / ||B||", True),
    "cap_factor": ("Shortening by the cap", "factor on the step", False),
}
NORMS = {"sigma_W": ("||W||", "solid"), "sigma_A": ("||A||", "dash"), "sigma_B": ("||B||", "dot")}


def probed(run: Run) -> dict[str, dict[str, Series]]:
    """module -> figure -> (steps, values) with finite values."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in run.steps:
        probes = row.get("probes")
        for module, figures in probes.items() if isinstance(probes, dict) else ():
            for key, value in figures.items() if isinstance(figures, dict) else ():
                if np.isfinite(number(value)):
                    found.setdefault(module, {}).setdefault(key, []).append((row["step"], number(value)))
    return {
        module: {
            key: (np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])) for key, pairs in kinds.items()
        }
        for module, kinds in found.items()
    }


def spectral_charts(run: Run, seen: dict[str, dict[str, Series]]) -> list[Chart]:
    """All charts that the probed figures allow; their sentences tell of all matrices, drawn or not."""
    charts = [norms(run, seen), bound(run, seen)]
    for key, (title, unit, log) in FIGURES.items():
        there = of_figure(seen, key)
        if there:
            text = f"{unit}: {span(np.concatenate([y for _, y in there.values()]))} over {len(there)} matrices."
            shape = layout(unit, log="y" if log else "")
            charts.append(Chart(key, title, text, curves(run, seen, key), shape, over_steps=True))
    return [chart for chart in charts if chart is not None]


def of_figure(seen: dict[str, dict[str, Series]], key: str) -> dict[str, Series]:
    """The matrices of which a figure was recorded."""
    return {module: kinds[key] for module, kinds in seen.items() if key in kinds}


def listed(seen: dict[str, dict[str, Series]]) -> list[str]:
    """The matrices that charts may draw."""
    names = list(seen)
    places = np.unique(np.linspace(0, len(names) - 1, min(LISTED, len(names))).round().astype(int))
    return [names[i] for i in places]


def curves(run: Run, seen: dict[str, dict[str, Series]], *keys: str) -> list[Trace]:
    """These figures of some matrices: one entry in the legend each, a dash for each figure."""
    names = listed(seen)
    points = POINTS // sum(len(seen[name]) for name in names)
    middle = (0, len(names) // 2, len(names) - 1)
    found = []
    for index, module in enumerate(names):
        there = [key for key in keys if key in seen[module]]
        for i, key in enumerate(there):
            name, dash = NORMS.get(key, ("", "solid"))
            more: dict[str, Any] = {"dash": dash, "legendgroup": module, "showlegend": i == 0, "points": points}
            trace = line(short_name(module), *seen[module][key], color_of(index), run.name, **more)
            if name:
                trace["hovertemplate"] = f"%{{y:.4g}} {name}"
            found.append(trace if index in middle else trace | {"visible": "legendonly"})
    return found


def norms(run: Run, seen: dict[str, dict[str, Series]]) -> Chart | None:
    """||W||, and of factors ||A||, ||B||."""
    last = [y[-1] for _, y in of_figure(seen, "sigma_W").values()]
    if not last:
        return None
    text = f"Solid ||W||, dashed ||A||, dotted ||B||, a colour per matrix. ||W|| at the last look: {span(last)}."
    data = curves(run, seen, *NORMS)
    return Chart("norms", "Spectral norms", text, data, layout("largest singular value"), over_steps=True)


def bound(run: Run, seen: dict[str, dict[str, Series]]) -> Chart | None:
    """||dW|| / eta where the rule promises a bound; else ||dW||."""
    ratios, steps = of_figure(seen, "update_ratio"), of_figure(seen, "update_norm")
    if not ratios and not steps:
        return None
    values = np.concatenate([y for _, y in (ratios or steps).values()])
    if not ratios:
        text = f"||dW||_2 of a step: at most {values.max():.4g}. This rule promises no bound."
        data = curves(run, seen, "update_norm")
        return Chart("update", "Change of W in a step", text, data, layout("||dW||", log="y"), over_steps=True)
    ends = [min(x[0] for x, _ in ratios.values()), max(x[-1] for x, _ in ratios.values())]
    data = curves(run, seen, "update_ratio")
    data.append(line("bound", ends, [1.0, 1.0], "#b3261e", run.name, dash="dash", mode="lines"))
    text = f"||dW||_2 / eta of {len(ratios)} matrices: at most {values.max():.4g}; "
    text += f"{(values > 1).sum()} of {len(values)} looks lie above the bound 1."
    return Chart("bound", "Change of W against its bound", text, data, layout("||dW|| / eta"), over_steps=True)


# -- maps -------------------------------------------------------------------------------------------------------


def place(module: str) -> tuple[str, str]:
    """(depth, kind) of a module: the first number in its name, and the name without it and what stands before."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    if match is None:
        return "-", module
    return match.group(1), module[match.end() :] or module


def short_name(module: str) -> str:
    """For a legend: depth and kind."""
    depth, kind = place(module)
    return kind if depth == "-" else f"{depth} {kind}"


def maps(run: Run, seen: dict[str, dict[str, Series]]) -> list[Frames]:
    """Ranks and energies, and what probes saw, as maps kind x depth along the run; those that say anything."""
    found = [rank_map(run), probe_map(seen)]
    return [frames for frames in found if frames is not None]


def rank_map(run: Run) -> Frames | None:
    """Rank of every matrix after each look, and the energy that it kept there (its last, since)."""
    ranks = first_ranks(run)
    if not ranks:
        return None
    energies: dict[str, float] = {}
    steps, at = [0], [(dict(ranks), dict(energies))]
    for row in run.looks:
        ranks |= {m: after for m, (_, after) in changes(row).items()}
        energy = row.get("energy")
        energies |= {m: number(e) for m, e in energy.items()} if isinstance(energy, dict) else {}
        steps.append(int(row["step"]))
        at.append((dict(ranks), dict(energies)))
    values = {"rank": [r for r, _ in at]}
    if energies:
        values["energy kept at the last look"] = [e for _, e in at]
    total = [sum(r.values()) for r in values["rank"]]
    text = f"{len(ranks)} matrices, ranks {span(ranks.values())}, their sum {total[-1]:,.0f}"
    text += f" after {len(run.looks)} changes, at first {total[0]:,.0f}." if run.looks else "; they did not change."
    return frames("ranks", "Ranks", text, steps, values)


def first_ranks(run: Run) -> dict[str, float]:
    """What the run started from: told at its start, or what the first change of each matrix says, or the end."""
    told: Any = next(
        (row["ranks"] for row in run.rows if row.get("event") in ("start", "end") and row.get("ranks")), {}
    )
    found = {m: number(r) for m, r in told.items()} if isinstance(told, dict) else {}
    seen: set[str] = set()
    for row in run.looks:
        for module, (before, _) in changes(row).items():
            if module not in seen:
                found[module] = before
                seen.add(module)
    return {m: r for m, r in found.items() if np.isfinite(r)}


def probe_map(seen: dict[str, dict[str, Series]]) -> Frames | None:
    """What probes saw of every matrix, where they look at more than a few."""
    if len(seen) <= SHOWN:
        return None
    names = list(dict.fromkeys(key for kinds in seen.values() for key in kinds))
    all_steps = np.unique(np.concatenate([x for kinds in seen.values() for x, _ in kinds.values()]))
    count = min(FRAMES, max(2, CELLS // (len(seen) * len(names))))
    kept = np.unique(np.linspace(0, len(all_steps) - 1, count).round().astype(int))
    steps = [int(s) for s in all_steps[kept]]
    values: dict[str, list[dict[str, float]]] = {}
    for key in names:
        by_step = {m: dict(zip(*kinds[key], strict=True)) for m, kinds in seen.items() if key in kinds}
        values[key] = [{m: v[s] for m, v in by_step.items() if s in v} for s in steps]
    text = f"What probes recorded of {len(seen)} matrices, at {len(steps)} steps."
    return frames("probes", "Probed matrices", text, steps, values)


def frames(id: str, title: str, text: str, steps: list[int], values: dict[str, list[dict[str, float]]]) -> Frames:
    """Lays matrices out by kind and depth."""
    modules = list(dict.fromkeys(m for frame_list in values.values() for frame in frame_list for m in frame))
    places = {m: place(m) for m in modules}
    depths = sorted({d for d, _ in places.values()}, key=lambda d: (not d.isdecimal(), int(d) if d.isdecimal() else 0))
    kinds = list(dict.fromkeys(k for _, k in places.values()))
    row_of, column_of = {k: i for i, k in enumerate(kinds)}, {d: i for i, d in enumerate(depths)}

    def grid(frame: dict[str, float]) -> list[list[float | None]]:
        cells = np.full((len(kinds), len(depths)), np.nan)
        for module, value in frame.items():
            depth, kind = places[module]
            cells[row_of[kind], column_of[depth]] = value
        return [short(row) for row in cells]

    laid = {name: [grid(frame) for frame in frame_list] for name, frame_list in values.items()}
    return Frames(id, title, text, steps, [label(d) for d in depths], [label(k) for k in kinds], laid)
