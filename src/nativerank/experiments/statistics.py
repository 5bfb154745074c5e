"""Mean, deviation and paired differences of losses by seed.

Runs of one seed share their data order and their initial dense matrices, so arms are compared seed by seed: the spread
between seeds that all arms share drops out. The interval is Student's,

    mean(d) +- t(0.975, n - 1) sd(d) / sqrt(n),   d_s = loss_s(arm) - loss_s(reference)

which needs two seeds and says little with so few: at n = 3 it is 2.5 standard deviations wide to each side.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEVEL = 0.95


class Spread(NamedTuple):
    """Mean and sample standard deviation (None for a single value)."""

    n: int
    mean: float
    sd: float | None


class Interval(NamedTuple):
    """A mean and where it lies with 95% confidence (None for a single value)."""

    n: int
    mean: float
    low: float | None
    high: float | None


def spread(values: Sequence[float]) -> Spread:
    """Of at least one finite value."""
    assert values and all(map(math.isfinite, values))
    return Spread(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def paired_difference(losses: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """Mean of losses - reference over the seeds that both have; None if they share no seed."""
    shared = sorted(losses.keys() & reference.keys())
    if not shared:
        return None
    n, mean, sd = spread([losses[seed] - reference[seed] for seed in shared])
    if sd is None:
        return Interval(n, mean, None, None)
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half)
