"""Cells that ran with several learning rates count once, at their best one.

A model that trains at a bad rate says nothing of its size. So among runs that are equal in all but the rate, those of
the rate with the lowest mean loss over the seeds stay; a rate at which a seed diverged is out unless all did.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from nativerank.scaling.records import Run

Key = tuple[str, float | None, float | None, float, float]


def best_rates(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """(the runs at the best rate of their cell, warnings where that is the lowest or highest one tried).

    Args:
        runs: with budgets. Those without a rate are left as they are.
    """
    cells: dict[Key, dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.lr is not None:
            cells[key_of(run)][run.lr].append(run)
    best = {key: min(rates, key=lambda lr: (mean_loss(rates[lr]), lr)) for key, rates in cells.items()}
    kept = [run for run in runs if run.lr is None or run.lr == best[key_of(run)]]
    edges = [key for key, rates in cells.items() if len(rates) > 1 and best[key] in (min(rates), max(rates))]
    several = sum(len(rates) > 1 for rates in cells.values())
    warnings = []
    if edges:
        named = next(run for run in runs if key_of(run) == edges[0])
        where = f"{named.size or f'{named.params:.3g} parameters'} at {named.budget:.3g} FLOPs"
        end = "lowest" if best[edges[0]] == min(cells[edges[0]]) else "highest"
        warnings.append(
            f"{len(edges)} of {several} cells are best at the lowest or highest rate tried "
            f"({where}: {best[edges[0]]:g} is the {end}); a better one may lie beyond"
        )
    return kept, warnings


def key_of(run: Run) -> Key:
    """What runs of one cell share."""
    return run.method, run.rank_ratio, run.budget, run.params, run.tokens


def mean_loss(runs: Sequence[Run]) -> float:
    """Over the seeds of a rate."""
    return math.fsum(run.loss for run in runs) / len(runs) if all(run.loss < math.inf for run in runs) else math.inf
