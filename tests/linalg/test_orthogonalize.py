"""The Gram-space iteration against its float64 textbook form, and against what it is meant to compute."""

import importlib

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from nativerank.linalg import gram, orthogonalize, orthogonalize_plain, orthogonalizing_factor
from nativerank.linalg.orthogonalize import coefficients, orthogonalize_flops, ridge

METHODS = [("newton-schulz", 5), ("polar-express", 5), ("polar-express", 7), ("polar-express", 9)]
SHAPES = [(64, 16), (3, 40, 8), (2, 3, 12, 12), (8, 40), (5, 1)]


@pytest.fixture(params=["products", "eigenvalues"])
def form(request, monkeypatch):
    """Both ways to the r x r factor, whatever the rank and the number of threads."""
    module = importlib.import_module("nativerank.linalg.orthogonalize")
    monkeypatch.setattr(module, "EIGEN_RANK", 1 if request.param == "eigenvalues" else 10**9)
    monkeypatch.setattr(module, "EIGEN_THREADS", 10**9)
    return request.param


def with_spectrum(d, r, values, seed=0):
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(d, r, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64)).Q
    return U * torch.as_tensor(values, dtype=torch.float64) @ V.T


@pytest.mark.parametrize("method, steps", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_plain_form_in_float64(method, steps, shape, form):
    M = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # 1e-7: the ridge (16 eps of float64) moves a singular value s by about eps / s^2, magnified by the steps.
    assert_close(orthogonalize(M, method, steps), orthogonalize_plain(M, method, steps), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(256, 64), (4, 512, 32), (1024, 256), (400, 300)])
def test_float32_is_exact_to_rounding_on_well_conditioned_input(shape, form):
    """1e-5 is 100 eps; an aggressive polynomial brings the ridge, and 1e-3 or so with it."""
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    for method, steps, tolerance in [("newton-schulz", 5, 1e-5), ("polar-express", 7, 3e-3)]:
        exact = orthogonalize_plain(M, method, steps)
        assert (orthogonalize(M, method, steps).double() - exact).norm() <= tolerance * exact.norm()


def test_the_ridge_is_there_where_rounding_would_grow():
    float32, float64 = torch.float32, torch.float64
    assert ridge(coefficients("newton-schulz", 5), float32) == 0.0
    for method, steps in [("newton-schulz", 8), ("polar-express", 5), ("polar-express", 7)]:
        assert ridge(coefficients(method, steps), float32) == 16 * torch.finfo(float32).eps
    assert ridge(coefficients("newton-schulz", 12), float64) == 0.0
    assert ridge(coefficients("newton-schulz", 16), float64) == 16 * torch.finfo(float64).eps


@pytest.mark.parametrize("d, r, steps", [(96, 24, 5), (40, 40, 1), (50, 8, 7)])
def test_counted_flops_are_what_runs(d, r, steps):
    M = torch.empty(3, d, r, device="meta")  # neither CPU shortcut
    with FlopCounterMode(display=False) as counter:
        orthogonalize(M, steps=steps)
    assert counter.get_total_flops() == 3 * orthogonalize_flops(d, r, steps)


def test_a_factor_that_is_not_finite_gives_nan_and_leaves_its_neighbours_alone(form):
    M = torch.randn(3, 20, 4)
    M[1, 2, 3] = float("inf")
    Q = orthogonalizing_factor(gram(M))
    assert Q[1].isnan().all()
    assert_close(Q[[0, 2]], orthogonalizing_factor(gram(M[[0, 2]])))


def test_seven_polar_express_steps_give_the_polar_factor():
    M = with_spectrum(80, 12, torch.logspace(0, -2, 12))
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    assert_close(orthogonalize(M, "polar-express", 7), U @ Vh, atol=5e-3, rtol=0)
    # Converged up to the safety factor's last trace: two steps later it is exact.
    assert_close(orthogonalize(M, "polar-express", 9), U @ Vh, atol=1e-6, rtol=0)


def test_newton_schulz_lands_where_the_docstring_says():
    s = torch.linspace(0.02, 1, 400, dtype=torch.float64)
    for a, b, c in coefficients("newton-schulz", 5):
        s = a * s + b * s**3 + c * s**5
    assert 0.67 < s.min() and s.max() < 1.21


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method, steps", [*METHODS, ("polar-express", 12), ("newton-schulz", 12)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_never_blows_up_on_bad_input(dtype, method, steps, scale, form):
    """Zero, rank 1, rank-deficient, nearly rank 1, condition 1e8: singular values stay below 1.25 (zeros at 0)."""
    d, r = 96, 24
    cases = {
        "zero": torch.zeros(d, r, dtype=torch.float64),
        "rank one": with_spectrum(d, r, [1.0] + [0.0] * (r - 1)),
        "half rank": with_spectrum(d, r, [1.0] * (r // 2) + [0.0] * (r // 2)),
        "spike": with_spectrum(d, r, [1.0] + [1e-6] * (r - 1)),
        "condition 1e8": with_spectrum(d, r, torch.logspace(0, -8, r)),
        "one column": torch.eye(d, r, dtype=torch.float64) * torch.eye(r, dtype=torch.float64)[0],
    }
    M = torch.stack([(m * scale).to(dtype) for m in cases.values()])
    sigma = torch.linalg.svdvals(orthogonalize(M, method, steps).double())
    assert torch.isfinite(sigma).all()
    assert (sigma.amax(-1) < 1.25).all(), dict(zip(cases, sigma.amax(-1).tolist(), strict=True))
    assert sigma[0].max() == 0 and (sigma[1:, 0] > 0.65).all()


def test_equivariance_under_rotations():
    """f(P M Z) = P f(M) Z for orthogonal P, Z: only singular values are touched."""
    M = torch.randn(30, 6, dtype=torch.float64)
    P = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    Z = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert_close(orthogonalize(P @ M @ Z), P @ orthogonalize(M) @ Z, rtol=1e-7, atol=1e-7)


def test_row_shards_with_a_reduced_gram_equal_the_whole():
    M = torch.randn(3, 40, 6, dtype=torch.float64)
    whole = gram(M)
    parts = [orthogonalize(part, reduce=lambda G: whole) for part in M.split([16, 24], dim=1)]
    assert_close(torch.cat(parts, dim=1), orthogonalize(M))


def test_bfloat16_in_bfloat16_out():
    M = torch.randn(20, 4).bfloat16()
    assert_close(orthogonalize(M), orthogonalize(M.float()).bfloat16())


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="'nearest'"):
        orthogonalize(torch.ones(3, 2), "nearest")
    with pytest.raises(ValueError, match="got 0"):
        orthogonalize(torch.ones(3, 2), steps=0)
    with pytest.raises(ValueError, match="must be tall"):
        orthogonalize(torch.ones(2, 3), reduce=lambda G: G)


@pytest.mark.parametrize(
    "method, steps, low, high",
    [("newton-schulz", 5, 0.67, 1.21), ("polar-express", 5, 0.85, 1.13), ("polar-express", 7, 0.99, 1.01)],
)
def test_singular_values_land_where_the_docstring_says(method, steps, low, high):
    for smallest in (0.02, 0.1, 0.5):
        M = with_spectrum(200, 2, [1.0, smallest * 1.02]).float()  # so that s / ||M||_F >= smallest
        sigma = torch.linalg.svdvals(orthogonalize(M, method, steps).double())
        assert low <= sigma.min() and sigma.max() <= high, sigma
