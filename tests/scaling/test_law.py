"""The robust fit against finite differences, against its own objective elsewhere, and against plain least squares."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize

from nativerank.scaling.law import DELTA, Law, huber, linear_starts, logsumexp
from nativerank.scaling.parametric import Problem
from nativerank.scaling.surface import SurfaceProblem


@pytest.fixture
def law():
    rng = np.random.default_rng(0)
    runs = 12
    features = [np.column_stack([np.ones(runs), rng.normal(size=(runs, k))]) for k in (0, 1, 3)]
    return Law(tuple(features), rng.normal(size=runs))


@pytest.mark.parametrize("scale", [1e-4, 1.0])  # residuals within delta, and far beyond
def test_gradient_is_that_of_finite_differences(law, scale):
    rng = np.random.default_rng(1)
    theta = rng.normal(size=law.size)
    near = Law(law.features, law.predict(theta) + scale * rng.normal(size=12))
    weights = rng.integers(0, 3, size=12).astype(float)
    _, gradient = near.value_and_gradient(theta, weights)
    expected = approx_fprime(theta, lambda t: near.value_and_gradient(t, weights)[0], 1e-8)
    # Forward differences of a function that bends within delta = 1e-3: good to a part in a thousand.
    np.testing.assert_allclose(gradient, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())


def test_jacobian_is_that_of_finite_differences(law):
    theta = np.random.default_rng(1).normal(size=law.size)
    predicted, jacobian = law.linearized(theta)
    np.testing.assert_allclose(predicted, law.predict(theta))
    for i, row in enumerate(jacobian):
        expected = approx_fprime(theta, lambda t, i=i: law.predict(t)[i], 1e-7)
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_objective_is_the_weighted_sum_of_huber_losses(law):
    theta, weights = np.random.default_rng(1).normal(size=(4, law.size)), np.arange(48.0).reshape(4, 12)
    r = (law.predict(theta) - law.log_loss) / DELTA
    expected = [
        sum(w * (x * x / 2 if abs(x) <= 1 else abs(x) - 0.5) for w, x in zip(*rows, strict=True))
        for rows in zip(weights, r, strict=True)
    ]
    np.testing.assert_allclose(law.objective(theta, weights), expected)
    assert law.value_and_gradient(theta[1], weights[1])[0] == pytest.approx(expected[1])


def test_logsumexp_is_safe():
    assert logsumexp(np.array([1000.0, 1000.0])) == pytest.approx(1000 + np.log(2))
    assert logsumexp(np.array([-1000.0, -3000.0])) == pytest.approx(-1000)


def test_huber_is_smooth_where_its_pieces_meet():
    assert huber(np.array([1 - 1e-9, 1 + 1e-9])) == pytest.approx([0.5, 0.5])


def test_resamples_are_fitted_as_well_as_one_by_one(sweep):
    """Side by side from the fit of all runs, none ends above what L-BFGS finds for it alone."""
    runs = sweep(noise=3e-3)
    problem, rng = Problem.of(runs), np.random.default_rng(2)
    theta = problem.fit()
    weights = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=20).astype(float)
    reached = problem.law.objective(problem.law.refine(theta, weights), weights)
    options = {"maxiter": 3000, "maxfun": 9000, "ftol": 1e-13, "gtol": 1e-9}
    for row, value in zip(weights, reached, strict=True):
        alone = minimize(
            problem.law.value_and_gradient, theta, args=(row,), jac=True, method="L-BFGS-B", options=options
        )
        assert value <= alone.fun * (1 + 1e-6)


def test_a_weight_is_as_good_as_a_copy(sweep):
    runs = sweep(noise=2e-3, sizes=4)
    twice = Problem.of(runs + runs[:5])
    weighted = Problem(
        Law(tuple(f[: len(runs)] for f in twice.law.features), twice.law.log_loss[: len(runs)]), twice.centre
    )
    weights = np.ones((1, len(runs)))
    weights[0, :5] = 2
    start = weighted.fit()
    np.testing.assert_allclose(
        twice.law.refine(start, np.ones((1, len(runs) + 5))), weighted.law.refine(start, weights), rtol=1e-6
    )


def test_linear_starts_are_exact_at_the_true_exponents(sweep, chinchilla):
    problem = Problem.of(sweep())
    start = linear_starts(
        problem.law.features, np.exp(problem.law.log_loss), np.array([[chinchilla.alpha, chinchilla.beta]])
    )
    # Order of theta: e, a, alpha, b, beta.
    assert problem.constants(start[0]).A == pytest.approx(chinchilla.A, rel=1e-6)
    assert problem.law.objective(start)[0] == pytest.approx(0, abs=1e-9)


def test_both_laws_are_sums_of_the_same_kind(sweep):
    with pytest.raises(ValueError, match="rank_ratio of every run"):
        SurfaceProblem.of(sweep())
