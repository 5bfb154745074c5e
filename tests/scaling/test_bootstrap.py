"""Resamples keep budgets whole; intervals do not depend on the order of rows; they cover what they should (slow)."""

import numpy as np
import pytest
from scipy.stats import t

from nativerank.scaling.bootstrap import drawn_minima, interval, resamples, without_each
from nativerank.scaling.entries import FEW_SIZES
from nativerank.scaling.isoflop import budgets_of, minima, power_law, usable


def n_interval(runs, samples, seed=0):
    budgets = budgets_of(runs)
    good = usable(budgets)
    if min(budget.sizes for budget in good) > FEW_SIZES:
        n, _ = minima(good, resamples(budgets, len(runs), samples, seed))
    else:
        n, _ = drawn_minima(good, samples, seed)
    return interval(power_law(np.log([budget.flops for budget in good]), n)[1])


def test_resamples_keep_the_runs_of_each_budget_and_three_sizes(sweep):
    runs = sweep(sizes=4)
    budgets = budgets_of(runs)
    weights = resamples(budgets, len(runs), 200)
    for budget in budgets:
        drawn = weights[:, budget.members]
        assert (drawn.sum(1) == 4).all()
        assert ((drawn > 0).sum(1) >= 3).all()
    assert len(np.unique(weights, axis=0)) > 150


def test_sizes_are_counted_not_runs(sweep):
    """Two seeds of each size: three draws of two sizes make no parabola."""
    runs = sweep(sizes=3, budgets=(1e18,)) * 2
    weights = resamples(budgets_of(runs), 6, 300)
    assert ((weights[:, :3] + weights[:, 3:]) > 0).all()
    assert (weights.max(0) > 1).all()


def test_every_run_is_drawn_as_often_as_any_other(sweep):
    runs = sweep(sizes=9, budgets=(1e18,))
    mean = resamples(budgets_of(runs), 9, 4000).mean(0)
    np.testing.assert_allclose(mean, 1, atol=0.08)  # 5 standard errors of 4000 draws


def test_the_order_of_runs_does_not_move_an_interval(sweep):
    runs = sweep(noise=2e-3)
    shuffled = [runs[i] for i in np.random.default_rng(3).permutation(len(runs))]
    assert n_interval(shuffled, 200) == pytest.approx(n_interval(runs, 200), rel=1e-9)
    assert n_interval(runs, 200, seed=1) != pytest.approx(n_interval(runs, 200), rel=1e-9)


def test_interval_holds_the_middle():
    assert interval(np.r_[np.arange(101.0), np.nan], 0.9) == pytest.approx([5, 95])
    assert interval(np.r_[np.zeros(10), np.full(90, np.inf)]) == [0, 1e300]  # no JSON has infinity
    assert interval(np.array([np.nan])) is None


def test_without_each_leaves_out_one_budget_a_row(sweep):
    runs = sweep(sizes=3)
    weights = without_each(budgets_of(runs), len(runs))
    np.testing.assert_array_equal(weights, 1 - np.kron(np.eye(4), np.ones(3)))


def test_drawn_minima_are_students(sweep):
    """A line through four of them, from 4 sizes each, is t with 4 degrees of freedom."""
    budgets = budgets_of(sweep(noise=1e-3, sizes=4))
    slope = np.array([-0.3, -0.1, 0.1, 0.3])
    values = drawn_minima(budgets, 20_000)[0] @ slope
    squares = sum(budget.scatter()[0] for budget in budgets)
    spread = np.sqrt(
        squares / 4 * sum(s**2 * budget.minimum_variance() for s, budget in zip(slope, budgets, strict=True))
    )
    centre = minima(budgets, np.ones((1, 16)))[0][0] @ slope
    low, high = interval(values)
    half = t.ppf(0.975, 4) * spread
    assert [low - centre, high - centre] == pytest.approx([-half, half], rel=0.04)  # a quantile of 20,000 draws
    away = np.abs(drawn_minima(budgets, 20_000)[0] - minima(budgets, np.ones((1, 16)))[0])
    assert np.corrcoef(away.T)[0, 1] > 0.1  # one variance for all budgets, so they are wrong about it together


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [4, 5, 9])
@pytest.mark.parametrize("noise", [1e-3, 3e-3])
def test_intervals_cover_the_truth(sweep, chinchilla, noise, sizes):
    """95% intervals of IsoFLOP exponents in 200 sweeps with noise, of grids that are off centre by up to 30%."""
    hits = 0
    for trial in range(200):
        shift = np.random.default_rng(1000 + trial).uniform(-0.3, 0.3)
        low, high = n_interval(sweep(noise=noise, sizes=sizes, seed=trial, shift=shift), 500, trial)
        hits += low <= chinchilla.n_exponent <= high
    assert hits >= 180
