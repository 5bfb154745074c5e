"""The parametric law recovers constants it was made from, whatever the units, the order and a few bad runs."""

from dataclasses import replace

import numpy as np
import pytest

from nativerank.scaling.parametric import Parametric, fit_parametric

LAWS = [
    Parametric(1.817, 482.0, 2085.0, 0.348, 0.366),
    Parametric(1.69, 406.4, 410.7, 0.34, 0.28),  # Hoffmann et al. 2022
    Parametric(0.5, 30.0, 300.0, 0.2, 0.3),
    Parametric(2.5, 5e3, 1e5, 0.55, 0.6),
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_constants_are_recovered(sweep, law):
    found = fit_parametric(sweep(law))
    for name, value in law.as_dict().items():
        assert found.as_dict()[name] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("law", LAWS[:2], ids=str)
def test_exponents_survive_noise(sweep, law):
    found = fit_parametric(sweep(law, noise=5e-4, sizes=11))
    assert found.n_exponent == pytest.approx(law.n_exponent, abs=0.01)
    assert found.alpha == pytest.approx(law.alpha, abs=0.01)
    assert found.beta == pytest.approx(law.beta, abs=0.01)


def test_outliers_hardly_move_it(sweep, chinchilla):
    runs = sweep(noise=2e-4)
    for place, factor in ((3, 1.05), (17, 1.3), (30, 0.97)):
        runs[place] = replace(runs[place], loss=runs[place].loss * factor)
    found = fit_parametric(runs)
    assert found.n_exponent == pytest.approx(chinchilla.n_exponent, abs=0.01)
    assert found.E == pytest.approx(chinchilla.E, abs=0.02)


def test_missing_cells_do_not_matter(sweep, chinchilla):
    runs = [run for place, run in enumerate(sweep()) if place % 3]
    assert fit_parametric(runs).alpha == pytest.approx(chinchilla.alpha, rel=1e-6)


def test_the_order_of_runs_does_not_matter(sweep):
    runs = sweep(noise=2e-3)
    shuffled = [runs[i] for i in np.random.default_rng(0).permutation(len(runs))]
    for name, value in fit_parametric(runs).as_dict().items():
        assert fit_parametric(shuffled).as_dict()[name] == pytest.approx(value, rel=1e-4)


def test_units_do_not_matter(sweep):
    """In millions of parameters and billions of tokens all but the prefactors stay, and these scale as powers."""
    runs = sweep(noise=2e-3)
    scaled = [replace(run, params=run.params / 1e6, tokens=run.tokens / 1e9) for run in runs]
    plain, other = fit_parametric(runs), fit_parametric(scaled)
    for name in ("E", "alpha", "beta"):
        assert getattr(other, name) == pytest.approx(getattr(plain, name), rel=1e-5)
    assert other.A * 1e6**other.alpha == pytest.approx(plain.A, rel=1e-3)
    assert other.B * 1e9**other.beta == pytest.approx(plain.B, rel=1e-3)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_best_size_is_where_the_loss_is_lowest(law):
    flops = 1e20
    sizes = law.best_params(flops) * np.array([0.99, 1.0, 1.01])
    loss = law.loss(sizes, flops / 6 / sizes)
    assert loss[1] < min(loss[0], loss[2])
    growth = np.log(law.best_params(1e21) / law.best_params(1e20)) / np.log(10)
    assert growth == pytest.approx(law.n_exponent)
    assert law.n_exponent + law.d_exponent == pytest.approx(1)


def test_too_few_runs_are_an_error(sweep):
    runs = sweep()
    with pytest.raises(ValueError, match="5 constants and needs 6 runs, got 5"):
        fit_parametric(runs[:5])
    with pytest.raises(ValueError, match="3 different params"):
        fit_parametric([replace(run, params=1e8) for run in runs])
