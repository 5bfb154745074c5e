"""The norm of a step against the SVD of the difference of dense products in float64."""

import pytest
import torch
from torch.testing import assert_close

from nativerank.linalg import update_norm

SHAPES = [(48, 40, 6), (40, 64, 24), (30, 30, 30), (3, 32, 20, 5), (2, 2, 16, 12, 10), (9, 7, 1)]  # (..., m, n, r)


def step(shape, ratio, seed=0, dtype=torch.float32):
    """Factors before and after, ||dW|| about ratio ||W||, stored in `dtype`."""
    *batch, m, n, r = shape
    g = torch.Generator().manual_seed(seed)
    A, B, dA, dB = (torch.randn(*batch, d, r, generator=g, dtype=torch.float64) for d in (m, n, m, n))
    return [X.to(dtype) for X in (A, B, A + ratio * dA, B + ratio * dB)]


def oracle(A, B, A_new, B_new):
    A, B, A_new, B_new = (X.double() for X in (A, B, A_new, B_new))
    return torch.linalg.svdvals(A_new @ B_new.mT - A @ B.mT)[..., 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4, 1e-6])
def test_it_is_the_largest_singular_value_of_the_difference(shape, ratio):
    factors = step(shape, ratio)
    W = factors[0].double() @ factors[1].double().mT
    expected = oracle(*factors)
    assert (expected < 20 * ratio * torch.linalg.matrix_norm(W, 2)).all(), "the step is as small as it should be"
    # The promise is 1e-3 at 1e-4; float64 gives far more, and the oracle itself cancels to 1e-16 / ratio.
    assert_close(update_norm(*factors), expected, rtol=1e-8, atol=0)


def test_a_step_that_a_difference_of_products_cannot_see():
    """||dW|| / ||W|| = 1e-18: forming W before and after in float64 gives nothing but rounding."""
    A, B, A_new, _ = step((40, 30, 5), 0.0, dtype=torch.float64)
    A[0], A_new[0] = 0.0, 1e-18
    truth = 1e-18 * B.sum(-1).norm()  # one row of dW, (1e-18, ..., 1e-18) B^T
    assert_close(update_norm(A, B, A_new, B), truth, rtol=1e-12, atol=0)
    assert not torch.isclose(oracle(A + 1, B, A_new + 1, B), truth, rtol=0.5, atol=0)


def test_a_change_of_gauge_is_no_step():
    """A S, B S^-T with S a power of two is the same W exactly, however much the factors moved."""
    A, B, *_ = step((20, 16, 4), 0.0)
    assert update_norm(A, B, 4 * A, B / 4) <= 1e-13 * oracle(0 * A, B, A, B)


def test_nothing_moved():
    A, B, *_ = step((20, 16, 4), 0.0)
    assert update_norm(A, B, A, B) == 0
    assert update_norm(0 * A, 0 * B, 0 * A, 0 * B) == 0
    assert_close(update_norm(0 * A, 0 * B, A, B), torch.linalg.matrix_norm(A.double() @ B.double().mT, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(4))
def test_a_factor_that_is_not_finite_gives_nan_and_leaves_its_neighbours_alone(bad, which):
    factors = step((3, 20, 16, 4), 1e-3)
    expected = oracle(*factors)
    factors[which][1, 5, 2] = bad
    found = update_norm(*factors)
    assert torch.isnan(found[1])
    assert_close(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_measured_as_stored(dtype):
    factors = step((24, 20, 4), 0.1, dtype=dtype)
    assert_close(update_norm(*factors), oracle(*factors))
