"""Parabolas and power laws against numpy's, and the exponents of known surfaces."""

from dataclasses import replace

import numpy as np
import pytest

from nativerank.scaling.isoflop import budgets_of, minima, power_law, profile, usable
from nativerank.scaling.parametric import Parametric
from nativerank.scaling.records import Run

SIZES = np.array([47, 67, 94, 101, 144, 202, 299, 457, 488, 787, 942, 1500]) * 1e6  # near the Spectron paper's


def exponents(runs):
    good = usable(budgets_of(runs))
    n, d = minima(good, np.ones((1, len(runs))))
    log_flops = np.log([budget.flops for budget in good])
    return power_law(log_flops, n)[1][0], power_law(log_flops, d)[1][0]


def test_a_parabola_is_numpys(sweep):
    runs = sweep(noise=3e-3)
    for budget in budgets_of(runs):
        x = budget.log_params - budget.log_params.mean()
        c, covariance = np.polyfit(x, budget.loss, 2, cov=True)
        slope = np.array([c[1] / (2 * c[0] ** 2), -1 / (2 * c[0]), 0])
        found = profile(budget)
        assert np.log(found.params) == pytest.approx(budget.log_params.mean() - c[1] / (2 * c[0]))
        assert found.loss == pytest.approx(np.polyval(c, -c[1] / (2 * c[0])))
        assert found.params_error == pytest.approx(float(np.sqrt(slope @ covariance @ slope)))
        assert found.params * found.tokens * 6 == pytest.approx(found.flops)


def test_the_standard_error_is_the_spread_of_minima(sweep, chinchilla):
    found, told = [], []
    for seed in range(300):
        first = profile(budgets_of(sweep(noise=1e-3, seed=seed, budgets=(1e19,)))[0])
        found.append(np.log(first.params))
        told.append(first.params_error**2)
    # 300 draws know a standard deviation to 4%.
    assert np.std(found) == pytest.approx(np.sqrt(np.mean(told)), rel=0.15)


@pytest.mark.parametrize(
    "law", [Parametric(1.817, 482.0, 2085.0, 0.348, 0.366), Parametric(1.69, 406.4, 410.7, 0.34, 0.28)], ids=str
)
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_exponents_of_centred_grids(sweep, law, shift):
    n, d = exponents(sweep(law, shift=shift))
    assert n == pytest.approx(law.n_exponent, abs=0.001)
    assert d == pytest.approx(law.d_exponent, abs=0.001)


def test_exponents_of_the_same_sizes_at_every_budget(chinchilla):
    """As the paper's grid, which is centred at no budget."""
    runs = []
    for flops in (2.20e18, 5.57e18, 1.41e19, 3.57e19):
        tokens = flops / 6 / SIZES
        losses = chinchilla.loss(SIZES, tokens)
        runs += [Run(n, d, flops, x, budget=flops) for n, d, x in zip(SIZES, tokens, map(float, losses), strict=True)]
    assert exponents(runs)[0] == pytest.approx(chinchilla.n_exponent, abs=0.01)


def test_tokens_are_those_of_the_runs_where_flops_are_exact(chinchilla):
    """C = 6 N D + 1e5 N^(1/3) D: D at the best N follows the runs, not C / 6 N."""
    flops, params = 1e18, np.geomspace(2e7, 4e8, 9)
    tokens = flops / (6 * params + 1e5 * np.cbrt(params))
    losses = chinchilla.loss(params, tokens)
    runs = [Run(n, d, flops, float(x), budget=flops) for n, d, x in zip(params, tokens, losses, strict=True)]
    found = profile(budgets_of(runs)[0])
    expected = flops / (6 * found.params + 1e5 * np.cbrt(found.params))
    assert found.tokens == pytest.approx(expected, rel=1e-3)
    assert found.tokens < 0.95 * flops / 6 / found.params


def test_faults_of_budgets_are_named(sweep):
    runs = sweep(shift=3.0, budgets=(1e18,))
    assert "outside the grid, below the smallest" in profile(budgets_of(runs)[0]).fault
    assert "outside the grid, above the largest" in profile(budgets_of(sweep(shift=-3.0, budgets=(1e18,)))[0]).fault
    assert profile(budgets_of(runs[:2])[0]).fault == "fewer than 3 sizes (2)"
    assert profile(budgets_of([*runs[:2], runs[0]])[0]).fault == "fewer than 3 sizes (2)"
    upside_down = [replace(run, loss=10 - run.loss) for run in sweep(budgets=(1e18,))]
    assert "opens downward" in profile(budgets_of(upside_down)[0]).fault


def test_three_sizes_have_no_standard_error(sweep):
    found = profile(budgets_of(sweep(sizes=3, budgets=(1e18,)))[0])
    assert found.used and found.params_error is None


def test_too_few_budgets_are_an_error(sweep):
    with pytest.raises(ValueError, match="need 2 budgets with a minimum each, got 1: there is one budget"):
        usable(budgets_of(sweep(budgets=(1e18,))))
    with pytest.raises(ValueError, match=r"got 0: 1e\+18 FLOPs: fewer than 3 sizes \(2\); 3e\+18 FLOPs"):
        usable(budgets_of(sweep(sizes=2, budgets=(1e18, 3e18))))


def test_power_laws_are_numpys_and_leave_out_what_is_missing():
    rng = np.random.default_rng(0)
    x, y = np.array([1.0, 2.0, 4.0, 5.0]), rng.normal(size=(3, 4))
    y[1, 2] = np.nan
    y[2, :3] = np.nan
    start, slope = power_law(x, y)
    assert [slope[0], start[0]] == pytest.approx(list(np.polyfit(x, y[0], 1)))
    there = [0, 1, 3]
    assert [slope[1], start[1]] == pytest.approx(list(np.polyfit(x[there], y[1, there], 1)))
    assert np.isnan(slope[2])


def test_a_weight_is_as_good_as_a_copy_of_a_run(sweep):
    runs = sweep(noise=3e-3, budgets=(1e18,))
    weights = np.ones((1, len(runs)))
    weights[0, 2] = 3
    copies = budgets_of([*runs, runs[2], runs[2]])[0]
    weighted = budgets_of(runs)[0]
    assert weighted.minima(weights)[0][0] == pytest.approx(copies.minima(np.ones((1, len(runs) + 2)))[0][0])
