"""How sure a fit is: resampled runs, intervals of percentiles, and budgets predicted from the others.

A resample draws, within each budget, as many runs as it has, with replacement, so that no budget is ever lost; one
that leaves a budget with fewer different sizes than a parabola needs is drawn again. It is handed on as how often
each run was drawn, and fits start at the fit of all runs, which makes a thousand of them cheap (`law`). With 4 sizes
a budget or fewer resampled parabolas scatter too little, and minima are drawn from the scatter of all budgets instead
(`drawn_minima`). Intervals cover the scatter of runs about the law, not what is wrong with the law: that shows where
a budget is predicted from the others.
"""

from collections.abc import Sequence

import numpy as np

from nativerank.scaling.isoflop import LEAST_SIZES, Budget, minima
from nativerank.scaling.law import Array

LEVEL = 0.95
LARGEST = 1e300  # stands for infinity, which JSON does not have


def resamples(budgets: Sequence[Budget], runs: int, samples: int, seed: int = 0) -> Array:
    """How often each run was drawn, (samples, runs)."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((samples, runs))
    for budget in budgets:
        weights[:, budget.members] = draws(budget, samples, rng)
    return weights


def draws(budget: Budget, samples: int, rng: np.random.Generator) -> Array:
    """How often each run of a budget was drawn, (samples, n)."""
    n, least = len(budget.members), min(LEAST_SIZES, budget.sizes)
    # Runs are drawn in the order of their sizes: the order of a table's rows must not change an interval.
    order = np.lexsort((budget.loss, budget.log_params))
    same = np.unique(budget.log_params[order], return_inverse=True)[1][:, None] == np.arange(budget.sizes)
    counts = np.zeros((samples, n))
    todo = np.arange(samples)
    while len(todo):
        counts[todo] = rng.multinomial(n, np.full(n, 1 / n), size=len(todo))
        todo = todo[((counts[todo] @ same) > 0).sum(1) < least]
    return counts[:, np.argsort(order)]


def drawn_minima(budgets: Sequence[Budget], samples: int, seed: int = 0) -> tuple[Array, Array]:
    """log N and log D of the lowest loss, (samples, K) each, drawn from what the scatter of all budgets together says.

    For budgets with too few sizes to resample. Losses are taken to have one variance, so that every line through the
    minima gets Student's t with as many degrees of freedom as the budgets have runs beyond their parabolas.
    """
    rng = np.random.default_rng(seed)
    squares, free = (sum(column) for column in zip(*(budget.scatter() for budget in budgets), strict=True))
    z = rng.standard_normal((samples, len(budgets))) / np.sqrt(rng.chisquare(free, size=(samples, 1)))
    width = np.sqrt(squares * np.array([budget.minimum_variance() for budget in budgets]))
    log_params = minima(budgets, np.ones((1, 1 + max(b.members.max() for b in budgets))))[0] + width * z
    log_tokens = [budget.tokens_at(log_params[:, k]) for k, budget in enumerate(budgets)]
    return log_params, np.stack(log_tokens, axis=1)


def interval(values: Array, level: float = LEVEL) -> list[float] | None:
    """Of the values the middle `level`, those that are no number left out; None if there are no others."""
    known = np.clip(values[~np.isnan(values)], -LARGEST, LARGEST)
    if not len(known):
        return None
    tail = (1 - level) / 2
    return [float(x) for x in np.quantile(known, [tail, 1 - tail])]


def without_each(budgets: Sequence[Budget], runs: int) -> Array:
    """Weights that leave one budget out each, (budgets, runs)."""
    weights = np.zeros((len(budgets), runs))
    for budget in budgets:
        weights[:, budget.members] = 1
    for row, budget in enumerate(budgets):
        weights[row, budget.members] = 0
    return weights
