"""Spread and paired intervals against scipy's own tests and closed forms."""

import math

import pytest
import scipy.stats

from nativerank.experiments.statistics import paired_difference, spread


def test_mean_and_deviation():
    assert spread([3.0]) == (1, 3.0, None)
    n, mean, sd = spread([3.0, 3.2, 3.7])
    assert n == 3 and mean == pytest.approx(3.3) and sd == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))


def test_the_interval_is_students():
    arm, reference = {0: 3.51, 1: 3.55, 2: 3.49, 3: 3.6}, {0: 3.45, 1: 3.52, 2: 3.46, 3: 3.50}
    found = paired_difference(arm, reference)
    differences = [arm[s] - reference[s] for s in arm]
    expected = scipy.stats.ttest_rel(list(arm.values()), list(reference.values())).confidence_interval(0.95)
    assert found.n == 4 and found.mean == pytest.approx(sum(differences) / 4)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_two_seeds_in_closed_form():
    """t(0.975, 1) = tan(0.475 pi), the quantile of Cauchy's distribution."""
    found = paired_difference({0: 1.0, 1: 1.4}, {0: 0.9, 1: 1.1})
    half = math.tan(0.475 * math.pi) * (0.2 / math.sqrt(2)) / math.sqrt(2)
    assert (found.mean, found.high - found.mean) == pytest.approx((0.2, half))


def test_only_shared_seeds_are_paired():
    found = paired_difference({0: 3.0, 1: 4.0, 5: 9.0}, {0: 2.9, 2: 1.0})
    assert found == (1, pytest.approx(0.1), None, None)
    assert paired_difference({0: 3.0}, {1: 3.0}) is None


def test_a_spread_that_seeds_share_drops_out():
    reference = {seed: 3.0 + seed for seed in range(5)}
    found = paired_difference({seed: loss - 0.25 for seed, loss in reference.items()}, reference)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.25, -0.25, -0.25))
