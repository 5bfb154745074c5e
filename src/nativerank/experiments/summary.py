"""What a comparison says, as plain numbers: `compare.json`, from which tables, figures and pages are made.

arms      one entry per arm: its best point, losses there by seed, spread, difference to the first arm of its group,
          parameters, FLOPs, time, diverged, failed and refused cells, steps that the guard refused, coordinates whose
          best stands at the edge
best      label -> best point;   cells   every run, flat
commits   commit -> cells that ran at it;   cell_threads   thread counts of the cells
curves    label -> training and validation loss against tokens, of the best point with the first seed
"""

import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from nativerank.experiments.cell_log import last_rows, origin, refused_steps
from nativerank.experiments.compare import Comparison, Tries
from nativerank.experiments.contender import Point
from nativerank.experiments.statistics import paired_difference, spread
from nativerank.train.setup import versions

CURVE_POINTS = 60
Entry = dict[str, Any]


def summary(comparison: Comparison) -> dict[str, Any]:
    """All of it."""
    for row in [row for tries in comparison.tries.values() for row in tries.rows.values()]:
        fill_in(row, comparison.folder)
    entries = [arm_entry(comparison, label) for label in comparison.contenders]
    for entry in entries:
        first = next(other for other in entries if other["group"] == entry["group"])
        difference = paired_difference(seeded(entry), seeded(first)) if entry is not first else None
        entry["reference"] = first["label"]
        entry["difference"] = difference._asdict() if difference else None
    best = {entry["label"]: entry["best"] for entry in entries if entry["best"] is not None}
    ran = {r["cell"]: r for tries in comparison.tries.values() for r in tries.rows.values() if "cell" in r}
    return {
        "environment": versions(),
        "commits": dict(Counter(row["commit"] for row in ran.values() if row.get("commit"))),
        "cell_threads": sorted({row["threads"] for row in ran.values() if row.get("threads")}),
        "budget": comparison.budget,
        "seeds": comparison.seeds,
        "arms": entries,
        "best": best,
        "cells": [cell for label in comparison.contenders for cell in cell_entries(comparison, label)],
        "curves": {label: line for label, point in best.items() if (line := curve(comparison, label, point))},
    }


def fill_in(row: dict[str, Any], folder: Path) -> None:
    """What a row of an earlier version lacks, from the cell's own record where it is still there; in place."""
    if "cell" not in row or "error" in row:
        return
    run = folder / "cells" / row["cell"]
    if "refused_steps" not in row:
        row["refused_steps"] = refused_steps(run)
    if "commit" not in row:
        row |= origin(run)


def seeded(entry: Entry) -> dict[int, float]:
    """Losses at the best point by seed; JSON would have made texts of the numbers."""
    return dict(zip(entry["seeds"], entry["val_losses"], strict=True))


def arm_entry(comparison: Comparison, label: str) -> Entry:
    """One arm at its best."""
    contender, tries = comparison.contenders[label], comparison.tries[label]
    best = comparison.best(label)
    losses = tries.losses(best) if best else {}
    n, mean, sd = spread(list(losses.values())) if losses else (0, None, None)
    rows = list(tries.rows.values())
    seconds = [row["seconds"] for row in (tries.at(best).values() if best else ()) if "seconds" in row]
    peaks = [row["peak_memory_bytes"] for row in rows if row.get("peak_memory_bytes")]
    return {
        "label": label,
        "group": contender.arm.group,
        "method": contender.arm.method,
        "settings": dict(contender.arm.settings),
        "rank": contender.rank,
        "steps": contender.steps,
        "tokens": contender.tokens,
        "flops": contender.flops,
        "flops_per_token": contender.flops_per_token,
        "parameters": contender.parameters,
        "best": best,
        "seeds": list(losses),
        "val_losses": list(losses.values()),
        "n": n,
        "mean": mean,
        "sd": sd,
        "perplexity": None if mean is None else math.exp(mean),
        "seconds": statistics.median(seconds) if seconds else None,
        "peak_memory_bytes": max(peaks, default=None),
        "cells": len(rows),
        "diverged": sum("diverged" in row for row in rows),
        "failed": sum("error" in row for row in rows),
        "refused": sum("refused" in row for row in rows),
        "refused_steps": [row["refused_steps"] for row in rows if row.get("refused_steps")],
        "refused_steps_at_best": tries.refused_steps(best) if best else 0,
        "edges": edges(tries, best) if best else [],
    }


def edges(tries: Tries, best: Point) -> list[dict[str, str]]:
    """Coordinates in which several values were tried and the best one stands at an end.

    A value that diverged was tried; one that failed for another reason or was refused was not.
    """
    tried = [p for p in tries.points() if any(not row.keys() & {"error", "refused"} for row in tries.at(p).values())]
    found = []
    for key, value in best.items():
        values = {point[key] for point in tried}
        if len(values) > 1 and value in (min(values), max(values)):
            found.append({"coordinate": key, "side": "lower" if value == min(values) else "upper"})
    return found


def cell_entries(comparison: Comparison, label: str) -> list[Entry]:
    """Every run of an arm, as one flat line each."""
    kept = ("val_loss", "step", "seconds", "diverged", "error", "refused", "refused_steps", "cell")
    return [
        {"method": label, **dict(point), "seed": seed, **{key: row[key] for key in kept if key in row}}
        for (point, seed), row in comparison.tries[label].rows.items()
    ]


def curve(comparison: Comparison, label: str, point: Point) -> Entry | None:
    """Loss against tokens of a point's first finished seed; the training loss averaged to at most CURVE_POINTS.

    None where the cell's folder is gone.
    """
    seed = next(iter(comparison.tries[label].losses(point)))
    rows = last_rows(comparison.run_folder(label, point, seed))
    if not rows:
        return None
    steps = [row for row in rows if isinstance(row.get("loss"), float)]
    validated = [[row["tokens"], row["val_loss"]] for row in rows if isinstance(row.get("val_loss"), float)]
    width = max(1, math.ceil(len(steps) / CURVE_POINTS))
    chunks = [steps[start : start + width] for start in range(0, len(steps), width)]
    return {
        "seed": seed,
        "flops_per_token": comparison.contenders[label].flops_per_token,
        "train": [[chunk[-1]["tokens"], statistics.fmean(row["loss"] for row in chunk)] for chunk in chunks],
        "validation": validated,
    }
