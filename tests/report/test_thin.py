"""A thinned curve hides nothing: extremes of every stretch stay, and only measured points are drawn."""

from itertools import pairwise

import numpy as np
import pytest

from nativerank.report.thin import extremes, medians, short, stretches


@pytest.mark.parametrize("n", [1, 2, 99, 100, 101, 1000, 54321])
@pytest.mark.parametrize("points", [4, 100, 1601])
def test_extremes_of_every_stretch_stay(n, points):
    values = np.random.default_rng(n).standard_cauchy(n)
    kept = extremes(values, points)
    assert len(kept) <= max(points, 4) or n <= points
    assert (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == n - 1
    bounds = stretches(n, max(1, (points - 2) // 2)) if n > points else range(n + 1)
    for low, high in pairwise(bounds):
        here = values[kept[(kept >= low) & (kept < high)]]
        assert here.min() == values[low:high].min() and here.max() == values[low:high].max()


def test_one_spike_among_many_steps_is_drawn_at_its_height():
    values = np.ones(200_000)
    values[123_457] = 9.0
    kept = extremes(values)
    assert 123_457 in kept and len(kept) <= 1600


def test_what_is_not_finite_hides_nothing():
    values = np.ones(10_000)
    values[::2], values[77], values[78] = np.nan, -5.0, np.inf
    kept = extremes(values, 100)
    assert 77 in kept and np.nanmin(values[kept]) == -5.0
    assert len(extremes(np.full(5000, np.nan), 100)) == 2


def test_medians_are_those_of_stretches():
    x, y = np.arange(1000.0), np.arange(1000.0)
    y[500] = 1e9
    at, middle = medians(x, y, 10)
    assert at.tolist() == [99.0 + 100 * i for i in range(10)]
    assert middle[0] == 49.5 and middle.max() < 1000
    assert [len(part) for part in medians(np.arange(0.0), np.arange(0.0))] == [0, 0]


def test_numbers_for_json():
    assert short(np.array([1 / 3, np.nan, np.inf, 1e20])) == [0.333333, None, None, 1e20]
