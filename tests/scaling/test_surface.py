"""The law with rank recovers what it was made from; its best shapes are those of a plain search."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from nativerank.scaling.parametric import fit_parametric
from nativerank.scaling.records import Run
from nativerank.scaling.surface import FamilyCost, Surface, SurfaceProblem, best_shapes, fit_cost, is_inside

TRUE = Surface(1.8, 482.0, 2085.0, 0.348, 0.366, 0.1, -0.15, (0.125 * 0.25 * 0.4 * 0.7) ** 0.25)
COST = FamilyCost(6.0, 1e5, 200.0)
RATIOS = (0.125, 0.25, 0.4, 0.7)


def runs_of(surface=TRUE, cost=COST, ratios=RATIOS, noise=0.0, seed=0):
    rng, runs = np.random.default_rng(seed), []
    for rho in ratios:
        for flops in (2.20e18, 5.57e18, 1.41e19):
            for params in map(float, surface.at(rho).best_params(flops) * np.exp(np.linspace(-1.2, 1.2, 5))):
                tokens = flops / float(cost(params, rho))
                loss = float(surface.loss(params, tokens, rho) * np.exp(noise * rng.standard_normal()))
                runs.append(Run(params, tokens, flops, loss, rho, "spectron", flops))
    return runs


def fitted(runs):
    problem = SurfaceProblem.of(runs)
    return problem.constants(problem.fit())


@pytest.mark.parametrize("gamma, kappa", [(0.1, -0.15), (-0.4, 0.0), (0.6, 0.1)])
def test_constants_are_recovered(gamma, kappa):
    true = replace(TRUE, gamma=gamma, kappa=kappa)
    found = fitted(runs_of(true)).as_dict()
    for name, value in true.as_dict().items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_exponents_survive_noise():
    found = fitted(runs_of(noise=5e-4))
    for name in ("alpha", "beta", "gamma", "kappa"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), abs=0.01)


@pytest.mark.parametrize("rho", RATIOS)
def test_at_one_ratio_it_is_the_parametric_law(rho):
    mine = [run for run in runs_of() if run.rank_ratio == rho]
    found, expected = fit_parametric(mine), TRUE.at(rho)
    assert found.A == pytest.approx(expected.A, rel=1e-4)
    assert expected.loss(1e8, 1e9) == pytest.approx(float(TRUE.loss(1e8, 1e9, rho)))


def test_effective_parameters_are_a_prefactor_in_disguise():
    power = replace(TRUE, kappa=0.0)
    A = TRUE.A * (0.25 / TRUE.rho_ref) ** (-TRUE.alpha * TRUE.gamma)
    assert power.at(0.25).A == pytest.approx(A)


def test_cost_is_recovered_from_the_runs():
    found = fit_cost(runs_of())
    assert (found.matrices, found.head, found.attention) == pytest.approx((6, 1e5, 200), rel=1e-6)
    assert found.error < 1e-9
    six_nd = fit_cost([replace(run, flops=6 * run.params * run.tokens) for run in runs_of()])
    assert (six_nd.matrices, six_nd.head, six_nd.attention) == pytest.approx((6, 0, 0), abs=1e-6)


def test_best_shape_is_that_of_a_plain_search():
    flops = 1e19

    def loss(point):
        params, rho = np.exp(point)
        return float(TRUE.loss(params, flops / COST(params, rho), rho))

    plain = minimize(loss, np.log([3e8, 0.3]), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-14})
    found = best_shapes(TRUE, flops, COST, 0.125, 0.7)
    assert float(found["loss"][0]) == pytest.approx(plain.fun, abs=1e-9)
    assert float(found["params"][0]) == pytest.approx(np.exp(plain.x[0]), rel=1e-3)
    assert float(found["rank_ratio"][0]) == pytest.approx(np.exp(plain.x[1]), rel=1e-3)
    assert float(found["tokens"][0] * COST(found["params"], found["rank_ratio"])[0]) == pytest.approx(flops)


def test_at_six_nd_the_best_ratio_is_the_top_of_the_parabola():
    found = best_shapes(TRUE, 1e19, FamilyCost(6.0, 0.0, 0.0), 0.125, 0.7)
    assert float(found["rank_ratio"][0]) == pytest.approx(TRUE.rho_ref * np.exp(0.1 / 0.3), rel=1e-3)
    assert is_inside(float(found["rank_ratio"][0]), 0.125, 0.7)


@pytest.mark.parametrize("gamma, end", [(0.5, 0.7), (-0.5, 0.125)])
def test_a_power_law_has_its_best_ratio_at_an_end(gamma, end):
    power = replace(TRUE, gamma=gamma, kappa=0.0)
    found = float(best_shapes(power, 1e19, FamilyCost(6.0, 0.0, 0.0), 0.125, 0.7)["rank_ratio"][0])
    assert found == pytest.approx(end) and not is_inside(found, 0.125, 0.7)


def test_many_constants_at_once_are_each_alone():
    problem = SurfaceProblem.of(runs_of(noise=1e-3))
    theta = problem.fit() * np.array([[1.0], [1.01]])
    together = best_shapes(problem.constants(theta), 1e19, COST, 0.125, 0.7)
    for i in range(2):
        alone = best_shapes(problem.constants(theta[i]), 1e19, COST, 0.125, 0.7)
        for key, value in alone.items():
            assert together[key][i] == pytest.approx(value[0])


def test_too_few_ratios_are_an_error():
    with pytest.raises(ValueError, match="3 rank ratios, got 30 and 2"):
        SurfaceProblem.of(runs_of(ratios=(0.2, 0.4)))
