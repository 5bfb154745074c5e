"""Norms and spectra against torch.linalg on the dense matrices."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from nativerank.linalg import (
    gram,
    gram_root,
    power_iteration,
    product_spectrum,
    singular_values,
    spectral_norm,
    stable_rank,
)
from nativerank.linalg.norms import power_iteration_flops


@pytest.mark.parametrize("shape", [(50, 7), (4, 50, 7), (7, 50), (9, 1)])
def test_spectral_norm_is_exact(shape):
    X = torch.randn(*shape, dtype=torch.float64)
    assert_close(spectral_norm(X), torch.linalg.matrix_norm(X, 2))


def test_spectral_norm_of_zero_and_rank_one():
    x = torch.randn(12, 1, dtype=torch.float64)
    y = torch.randn(1, 4, dtype=torch.float64)
    assert_close(
        spectral_norm(torch.stack([x @ y, 0 * x @ y])), torch.stack([x.norm() * y.norm(), torch.zeros(()).double()])
    )


def test_power_iteration_converges_from_below_and_stays_warm():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(3, 60, 10, dtype=torch.float64, generator=g)
    u = torch.nn.functional.normalize(torch.randn(3, 60, dtype=torch.float64, generator=g), dim=-1)
    truth, previous = torch.linalg.matrix_norm(X, 2), torch.zeros(3, dtype=torch.float64)
    for _ in range(200):
        sigma, u = power_iteration(X, u)
        assert (sigma <= truth * (1 + 1e-12)).all() and (sigma >= previous - 1e-12).all()
        assert_close(u.norm(dim=-1), torch.ones(3, dtype=torch.float64))
        previous = sigma
    assert_close(previous, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("d, r, steps", [(40, 7, 1), (9, 9, 3)])
def test_counted_flops_of_power_iteration_are_what_runs(d, r, steps):
    with FlopCounterMode(display=False) as counter:
        power_iteration(torch.randn(2, d, r), torch.randn(2, d), steps)
    assert counter.get_total_flops() == 2 * power_iteration_flops(d, r, steps)


def test_many_iterations_at_once_equal_one_at_a_time():
    X, u = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    at_once = power_iteration(X, u, steps=3)
    v = u
    for _ in range(3):
        # v = X^T u is recomputed from the carried u, so restarting changes nothing
        sigma, v = power_iteration(X, v)
    assert_close(at_once, (sigma, v))


def test_power_iteration_of_zero_is_zero_and_keeps_the_direction():
    u = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    X = torch.stack([torch.zeros(8, 3), torch.randn(8, 3)])
    sigma, new = power_iteration(X, u)
    assert sigma[0] == 0 and sigma[1] > 0
    assert_close(new[0], u[0])
    assert torch.isfinite(new).all()


def test_power_iteration_on_row_shards():
    X, u = torch.randn(24, 4, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    sigma, new = power_iteration(X, u)
    # One process holds rows 0..15, the other the rest: record what each would contribute, then replay the sums.
    halves = [(X[:16], u[:16]), (X[16:], u[16:])]
    sums: list[torch.Tensor] = []

    def run(part, reduce):
        return power_iteration(*part, reduce=reduce)

    for call in range(3):  # three reductions: X^T u, |X v|^2, X^T u
        contributions = []
        for part in halves:
            seen = []

            def collect(t, seen=seen):
                seen.append(t)
                return sums[len(seen) - 1] if len(seen) <= len(sums) else t

            run(part, collect)
            contributions.append(seen[call])
        sums.append(contributions[0] + contributions[1])
    results = []
    for part in halves:
        replay = iter(sums)
        results.append(run(part, lambda t, replay=replay: next(replay)))
    assert_close(results[0][0], sigma)
    assert_close(torch.cat([r[1] for r in results]), new)


def test_product_spectrum_is_that_of_the_dense_product():
    A, B = torch.randn(2, 40, 6, dtype=torch.float64), torch.randn(2, 30, 6, dtype=torch.float64)
    dense = torch.linalg.svdvals(A @ B.mT)[..., :6]
    assert_close(product_spectrum(A, B), dense)
    assert_close(stable_rank(product_spectrum(A, B)), (dense**2).sum(-1) / dense[..., 0] ** 2)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (3, 9, 9), (5, 1)])
def test_singular_values_of_a_dense_matrix(shape):
    X = torch.randn(*shape)
    assert_close(singular_values(X), torch.linalg.svdvals(X.double()), atol=1e-7, rtol=1e-7)  # through a Gram matrix
    assert torch.isnan(singular_values(X.fill_(torch.inf))).all()


def test_product_spectrum_of_degenerate_factors():
    A = torch.zeros(3, 20, 4, dtype=torch.float64)
    A[1] = torch.randn(20, 1, dtype=torch.float64) @ torch.randn(1, 4, dtype=torch.float64)
    A[2, :, :2] = torch.randn(20, 2, dtype=torch.float64)
    B = torch.randn(3, 15, 4, dtype=torch.float64)
    assert_close(product_spectrum(A, B), torch.linalg.svdvals(A @ B.mT)[..., :4], atol=1e-6, rtol=1e-8)
    assert stable_rank(product_spectrum(A, B))[0] == 0


def test_gram_root_preserves_lengths():
    X, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert_close((gram_root(X) @ y).norm(), (X @ y).norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_nan_and_leaves_its_neighbours_alone(bad):
    X = torch.randn(3, 20, 4)
    X[1, 5, 2] = bad
    B = torch.randn(3, 10, 4)
    sigma, spectrum = spectral_norm(X), product_spectrum(X, B)
    assert torch.isnan(sigma[1]) and torch.isnan(spectrum[1]).all()
    assert stable_rank(spectrum).isnan().tolist() == [False, True, False]
    assert_close(sigma[[0, 2]], torch.linalg.matrix_norm(X[[0, 2]], 2), rtol=1e-5, atol=0)
    assert_close(spectrum[[0, 2]], torch.linalg.svdvals((X @ B.mT)[[0, 2]].double())[..., :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(200, 128), (150, 130), (2, 70, 200)])
@pytest.mark.parametrize("wide", [False, True])
def test_a_gram_matrix_in_panels_is_that_of_one_product(shape, wide):
    X = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT if wide else torch.randn(*shape)
    assert_close(gram(X), X.mT @ X)
