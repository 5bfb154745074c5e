"""Singular values of factors -> W in closed form, against the map written out as a matrix; claims of docs/math.md."""

import pytest
import torch
from torch.func import jacrev
from torch.testing import assert_close

from nativerank.linalg import product_spectrum, qr_vjp, retract, tangent
from nativerank.linalg.jacobian import balanced_condition, frame_extremes, pair_extremes, smallest_turn

SHAPES = [(7, 5, 3), (5, 5, 2), (4, 6, 4), (4, 4, 4), (6, 5, 1)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair(d_out, d_in, r):
    return torch.randn(d_out, r, dtype=torch.float64), torch.randn(d_in, r, dtype=torch.float64)


def triple(d_out, d_in, r):
    A, B = pair(d_out, d_in, r)
    s = torch.rand(r, dtype=torch.float64) + 0.3
    return retract(A), s * torch.where(torch.arange(r) % 2 == 0, 1.0, -1.0), retract(B)


def scales(J):
    """Singular values that are not 0, descending."""
    values = torch.linalg.svdvals(J)
    return values[values > 1e-10 * values[0]]


def pair_scales(A, B):
    J = jacrev(lambda A, B: A @ B.mT, argnums=(0, 1))(A, B)
    return scales(torch.cat([j.reshape(A.shape[0] * B.shape[0], -1) for j in J], 1))


def tangent_basis(U):
    """Orthonormal basis (d r, k) of the directions tangent to U."""
    basis = torch.eye(U.numel(), dtype=U.dtype).reshape(-1, *U.shape)
    P = torch.stack([tangent(U, E).flatten() for E in basis])
    values, vectors = torch.linalg.eigh(P)
    return vectors[:, values > 0.5]


def triple_scales(U, s, V):
    J_U, J_s, J_V = jacrev(lambda U, s, V: (U * s) @ V.mT, argnums=(0, 1, 2))(U, s, V)
    m = U.shape[0] * V.shape[0]
    parts = [J_U.reshape(m, -1) @ tangent_basis(U), J_s.reshape(m, -1), J_V.reshape(m, -1) @ tangent_basis(V)]
    return torch.linalg.svdvals(torch.cat(parts, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_of_a_pair(shape):
    d_out, d_in, r = shape
    A, B = pair(*shape)
    a, b = torch.linalg.svdvals(A), torch.linalg.svdvals(B)
    within = (a[:, None].square() + b.square()).sqrt().flatten()
    want = torch.cat([within, b.repeat(d_out - r), a.repeat(d_in - r)]).sort(descending=True).values
    values = pair_scales(A, B)
    assert len(values) == r * (d_out + d_in - r)  # the r^2 others are the gauge
    assert_close(values, want)
    assert_close(pair_extremes(A, B), (want[-1], want[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_of_frames(shape):
    d_out, d_in, r = shape
    U, s, V = triple(*shape)
    size = s.abs()
    i, j = torch.triu_indices(r, r, 1)
    turns = torch.cat([(size[i] - size[j]).abs(), size[i] + size[j]]) / 2**0.5
    want = torch.cat([torch.ones(r, dtype=torch.float64), turns, size.repeat(d_out + d_in - 2 * r)])
    values = triple_scales(U, s, V)
    assert_close(values, want.sort(descending=True).values)
    assert len(values) == r * (d_out + d_in - r)  # as many as W has degrees of freedom: none is left for a gauge
    assert_close(frame_extremes(s), (size.min(), size.max()))
    assert_close(smallest_turn(s), turns[: len(i)].min() if r > 1 else torch.tensor(torch.inf).double())


def test_the_gauge_of_a_pair_moves_its_condition_without_limit_and_never_below_the_balanced_one():
    A, B = pair(9, 8, 4)
    sigma = product_spectrum(A, B)
    best = balanced_condition(sigma)
    conditions = []
    for c in (1.0, 10.0, 1e3):
        S = c * torch.randn(4, 4, dtype=torch.float64)
        A2, B2 = A @ S, B @ torch.linalg.inv(S).mT
        assert_close(A2 @ B2.mT, A @ B.mT)
        smallest, largest = pair_extremes(A2, B2)
        conditions.append(largest / smallest)
        assert conditions[-1] >= best * (1 - 1e-12)
    assert conditions[2] > 1e3 * best
    U, s, Vh = torch.linalg.svd(A @ B.mT)
    root = s[:4].sqrt()
    smallest, largest = pair_extremes(U[:, :4] * root, Vh[:4].mT * root)
    assert_close(largest / smallest, best)


def test_frames_of_a_matrix_are_its_own_up_to_signs_and_order():
    U, s, V = triple(7, 6, 3)
    W = (U * s) @ V.mT
    P, sigma, Zh = torch.linalg.svd(W)
    order = s.abs().argsort(descending=True)
    assert_close(sigma[:3], s.abs()[order])
    for found, ours in ((P[:, :3], U[:, order]), (Zh[:3].mT, V[:, order])):
        assert_close((found * ours).sum(0).abs(), torch.ones(3, dtype=torch.float64))


def test_a_frame_layer_stretches_between_its_extreme_s_and_a_pair_is_known_only_by_its_product():
    U, s, V = triple(9, 8, 4)
    W = (U * s) @ V.mT
    x, g = torch.randn(8, 50, dtype=torch.float64), torch.randn(9, 50, dtype=torch.float64)
    low, high = frame_extremes(s)
    for out, seen in ((W @ x, V.mT @ x), (W.mT @ g, U.mT @ g)):
        ratio = out.norm(dim=0) / seen.norm(dim=0)
        assert (low * (1 - 1e-12) <= ratio).all() and (ratio <= high * (1 + 1e-12)).all()
    S = torch.diag(torch.tensor([1e3, 1, 1, 1e-3], dtype=torch.float64))
    A, B = U * s @ S, V @ torch.linalg.inv(S)
    norm = torch.linalg.matrix_norm
    assert_close(norm(A @ B.mT, 2), high)
    assert norm(A, 2) * norm(B, 2) > 1e5 * high


def test_dividing_by_s_makes_every_direction_beyond_the_spans_count_the_same():
    U, s, V = triple(9, 8, 4)
    Z = torch.randn(9, 8, dtype=torch.float64)
    out = lambda Q: torch.eye(len(Q), dtype=Q.dtype) - Q @ Q.mT  # noqa: E731
    D_U, D_V = out(U) @ (Z @ V) / s, out(V) @ (Z.mT @ U) / s  # gradients (Z V s, Z^T U s) divided by s^2
    moved = (D_U * s) @ V.mT + (U * s) @ D_V.mT
    assert_close(moved, out(U) @ Z @ V @ V.mT + U @ U.mT @ Z @ out(V))


def test_the_gradient_through_qr_has_no_part_along_any_column():
    A = torch.randn(12, 4, dtype=torch.float64)
    Q, R = torch.linalg.qr(A)
    dA = qr_vjp(Q, R, torch.randn(12, 4, dtype=torch.float64))
    assert_close((A * dA).sum(0), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
