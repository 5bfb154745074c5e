"""Retractions against their defining laws: orthonormal for every X, factors of X, and right to first order."""

import pytest
import torch
from torch.testing import assert_close

from nativerank.linalg import frame_factor, qr_vjp, retract, tangent

WAYS = ("qr", "cholesky", "polar")
ALL = (*WAYS, "cayley")
LIMIT = {torch.float32: 5e-6, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def frame(*shape, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64)).Q.to(dtype)


def spread(d, r, digits, dtype):
    """A (d, r) matrix with singular values from 1 to 10^-digits in random directions."""
    return ((frame(d, r) * torch.logspace(0, -digits, r, dtype=torch.float64)) @ frame(r, r).mT).to(dtype)


def hard_cases(dtype, d=60, r=7):
    """A stack (n, d, r): any condition, no rank, columns zero, equal, and of very different size, huge, tiny."""
    X = torch.randn(d, r, dtype=dtype)
    zero_column, twins = X.clone(), X.clone()
    zero_column[:, 3] = 0
    twins[:, 5] = twins[:, 0]
    scales = torch.logspace(-12, 12, r, dtype=torch.float64).to(dtype)
    special = [0 * X, X.sign()[:, :1].expand(d, r), zero_column, twins, X * scales, 1e18 * X, 1e-18 * X, 1e-30 * X]
    return torch.stack([spread(d, r, digits, dtype) for digits in (0, 0.2, 0.5, 1, 2, 3, 5, 8, 14)] + special)


def off_orthonormal(Q):
    Q = Q.double()
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().amax((-2, -1))


def step(dtype=torch.float64, size=0.3, n=4, d=40, r=6):
    """Frames U and directions D; X = U - D."""
    U = frame(n, d, r)
    return U.to(dtype), (size * torch.randn(n, d, r, dtype=torch.float64) / d**0.5).to(dtype)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("way", WAYS)
def test_every_finite_matrix_becomes_a_frame_and_is_the_product(way, dtype):
    X = hard_cases(dtype)
    Q, R = frame_factor(X, way)
    assert (off_orthonormal(Q) <= LIMIT[dtype]).all(), off_orthonormal(Q)
    over = -2 if way != "polar" else (-2, -1)  # a symmetric R mixes columns of different size
    scale = X.double().norm(dim=over, keepdim=True).clamp_min(1e-300)
    difference = (Q.double() @ R.double() - X.double()) / scale
    assert difference.abs().max() <= LIMIT[dtype]
    assert Q.dtype == R.dtype == dtype


@pytest.mark.parametrize("dtype", LIMIT)
def test_cayley_gives_frames_however_long_the_step(dtype):
    U, D = step(dtype)
    for size in (0.0, 1e-3, 1.0, 1e3, 1e18):
        assert (off_orthonormal(retract(U - size * D, "cayley", U)) <= LIMIT[dtype]).all()


@pytest.mark.parametrize("shape", [(8192, 32), (3000, 100), (256, 256), (5, 1), (1, 1)])
@pytest.mark.parametrize("way", ALL)
def test_a_step_of_ordinary_shapes_ends_orthonormal(way, shape):
    U = frame(2, *shape, dtype=torch.float32)
    X = U - 0.3 * torch.randn(2, *shape) / sum(shape) ** 0.5
    assert (off_orthonormal(retract(X, way, U)) <= 5e-6).all()


@pytest.mark.parametrize("way", WAYS)
def test_one_direction_apart_is_seen_however_many_columns_share_it(way):
    """Entries of r x r matrices hide a single eigenvalue that is off: it is spread over all of them."""
    P, Z = frame(300, 256), frame(256, 256)
    for first in (0.2, 0.5, 2.0, 5.0):
        s = torch.ones(256, dtype=torch.float64)
        s[0] = first
        assert off_orthonormal(retract(((P * s) @ Z.mT).float(), way)).max() <= 5e-6


@pytest.mark.parametrize("columns_first", [False, True])
def test_cholesky_is_sign_fixed_qr(columns_first):
    X = torch.stack([spread(50, 6, digits, torch.float64) for digits in (0, 1, 2, 5)])
    X = X.mT.contiguous().mT if columns_first else X
    Q, R = frame_factor(X)
    want_Q, want_R = torch.linalg.qr(X)
    sign = want_R.diagonal(dim1=-2, dim2=-1).sign()
    assert_close(Q, want_Q * sign.unsqueeze(-2), atol=1e-9, rtol=0)
    assert_close(R, sign.unsqueeze(-1) * want_R)
    assert (R.diagonal(dim1=-2, dim2=-1) > 0).all() and not R.tril(-1).any()
    assert_close(frame_factor(X, "qr"), (Q, R), atol=1e-9, rtol=0)


def test_a_zero_on_the_diagonal_keeps_its_column():
    X = torch.tensor([[0.0, 1], [0, 0], [0, 0]])
    for way in WAYS:
        assert off_orthonormal(retract(X, way)) <= 1e-6
    assert_close(retract(X, "qr").norm(dim=0), torch.ones(2))


def test_polar_is_the_nearest_frame():
    X = torch.stack([spread(30, 5, digits, torch.float64) for digits in (0.3, 1, 3)])
    Q, H = frame_factor(X, "polar")
    P, _, Zh = torch.linalg.svd(X, full_matrices=False)
    assert_close(Q, P @ Zh, atol=1e-9, rtol=0)
    assert_close(H, H.mT)
    assert (torch.linalg.eigvalsh(H) > 0).all()
    nearest = (X - Q).norm(dim=(-2, -1))
    competitors = [
        retract(X, "qr"),
        frame(3, 30, 5),
        *(retract(Q + e * torch.randn_like(Q)) for e in (1e-3, 1e-2, 0.1)),
    ]
    for other in competitors:
        assert (nearest < (X - other).norm(dim=(-2, -1))).all()


def slope(way, U, D, t=1e-4):
    """-dQ/dt of the retraction of U - t D at t = 0, with an error of t^2."""
    return (retract(U + t * D, way, U) - retract(U - t * D, way, U)) / (2 * t)


@pytest.mark.parametrize("way", ALL)
def test_every_way_follows_a_tangent_step_to_first_order(way):
    U, D = step()
    T = tangent(U, D)
    assert_close(slope(way, U, T), T, atol=1e-7, rtol=0)  # t^2 = 1e-8, times constants


def test_other_steps_are_projected_by_polar_and_cayley_and_rotated_by_a_triangular_root():
    U, D = step()
    for way in ("polar", "cayley"):
        assert_close(slope(way, U, D), tangent(U, D), atol=1e-7, rtol=0)
    M = U.mT @ D
    rotated = D - U @ (M.triu() + M.tril(-1).mT)
    for way in ("qr", "cholesky"):
        assert_close(slope(way, U, D), rotated, atol=1e-7, rtol=0)
    skew = U.mT @ (rotated - tangent(U, D))
    assert_close(skew, -skew.mT)
    assert skew.norm() > 0.1 * D.norm()


def test_polar_has_no_acceleration_along_the_frames():
    """Like a geodesic of the Euclidean metric; the others turn to second order."""
    U, D = step()
    T, t = tangent(U, D), 1e-3
    for way in ALL:
        acceleration = (retract(U - t * T, way, U) + retract(U + t * T, way, U) - 2 * U) / t**2
        inside = tangent(U, acceleration).norm() / T.norm() ** 2
        assert (inside < 1e-4) == (way == "polar")  # t^2 = 1e-6 against 0.1


def skew_generator(U, D):
    """K (..., d, d) with K U = tangent(U, D)."""
    P = torch.eye(U.shape[-2], dtype=U.dtype) - U @ U.mT / 2
    return P @ D @ U.mT - U @ D.mT @ P


def test_cayley_is_the_rotation_by_its_generator_to_second_order():
    U, D = step()
    error = [
        (retract(U - t * D, "cayley", U) - torch.linalg.matrix_exp(-t * skew_generator(U, D)) @ U).norm()
        for t in (2e-2, 1e-2)
    ]
    assert 7.5 < error[0] / error[1] < 8.5  # O(t^3)


def test_cayley_is_its_formula():
    U, D = step()
    K, I = skew_generator(U, D), torch.eye(40, dtype=U.dtype)
    assert_close(K @ U, tangent(U, D))
    assert_close(retract(U - D, "cayley", U), torch.linalg.solve(I + K / 2, (I - K / 2) @ U))


@pytest.mark.parametrize("way", ALL)
def test_rotations_from_the_left_pass_through(way):
    U, D = step()
    O = frame(40, 40)
    assert_close(retract(O @ (U - D), way, O @ U), O @ retract(U - D, way, U))


@pytest.mark.parametrize("way", ALL)
def test_frames_stay_where_they_are(way):
    U, _ = step()
    assert_close(retract(U, way, U), U)


@pytest.mark.parametrize("way", WAYS)
def test_a_stack_is_its_matrices_one_by_one(way):
    X = hard_cases(torch.float64)
    Q, R = frame_factor(X, way)
    for x, q, h in zip(X, Q, R, strict=True):
        assert_close(frame_factor(x, way), (q, h))
    assert_close(retract(X.reshape(1, *X.shape), way)[0], Q)
    assert retract(X[:0], way).shape == (0, 60, 7)


@pytest.mark.parametrize("way", WAYS)
def test_a_matrix_that_is_not_finite_is_nan_alone(way):
    X = torch.randn(4, 20, 3)
    whole = retract(X, way)
    X[1, 4, 2], X[2, 0, 0] = torch.nan, torch.inf
    Q, R = frame_factor(X, way)
    assert Q[1:3].isnan().all() and R[1:3].isnan().all()
    assert_close(Q[::3], whole[::3])


def test_cayley_of_what_is_not_finite_is_nan_alone():
    U, D = step()
    D[1, 0, 0] = torch.nan
    Q = retract(U - D, "cayley", U)
    assert Q[1].isnan().all() and Q[[0, 2, 3]].isfinite().all()


def test_half_precision_is_computed_in_float32():
    X = torch.randn(40, 4).bfloat16()
    Q, R = frame_factor(X)
    assert (Q.dtype, R.dtype) == (torch.bfloat16, torch.float32)
    assert_close(Q, retract(X.float()).bfloat16())


@pytest.mark.parametrize("way", ["cholesky", "polar", "cayley"])
@pytest.mark.parametrize("dtype", LIMIT)
def test_shards_of_rows_give_the_rows_of_the_whole(way, dtype):
    """Lockstep stand-in for two processes: each sum is made from both halves, which are the same length."""
    U, D = step(dtype)
    X = torch.cat([U - D, spread(40, 6, 3, dtype)[None]])
    U = torch.cat([U, frame(1, 40, 6, dtype=dtype)])
    whole = retract(X, way, U)
    assert_close(sharded(lambda x, u, reduce: retract(x, way, u, reduce), X, U), whole)


def sharded(function, *tall):
    """Runs `function` on both halves of the rows in two threads whose `reduce` adds their arguments."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    half, barrier, slots = tall[0].shape[-2] // 2, Barrier(2, timeout=20), [None, None]

    def one(k):
        def reduce(x):
            slots[k] = x
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        rows = slice(0, half) if k == 0 else slice(half, None)
        return function(*(t[..., rows, :] for t in tall), reduce)

    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(one, (0, 1))), -2)


def test_sharded_tangent_and_derivative():
    U, D = step()
    R = torch.linalg.qr(torch.randn(4, 6, 6, dtype=torch.float64)).R
    assert_close(sharded(tangent, U, D), tangent(U, D))
    assert_close(sharded(lambda q, g, reduce: qr_vjp(q, R, g, reduce), U, D), qr_vjp(U, R, D))


@pytest.mark.parametrize("way", ["cholesky", "polar"])
def test_shards_that_lost_their_rank_are_an_error_and_nan_is_not(way):
    reduce = lambda x: x  # noqa: E731
    X = torch.randn(2, 20, 3)
    X[1, 0, 0] = torch.nan
    assert retract(X, way, reduce=reduce)[1].isnan().all()
    with pytest.raises(ValueError, match=r"lost its rank.*\(1, 20, 3\)"):
        retract(torch.ones(20, 3), way, reduce=reduce)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"X": torch.ones(3, 4)}, r"as many rows as columns, got \(3, 4\)"),
        ({"X": torch.ones(4, 3), "way": "svd"}, "got 'svd'"),
        ({"X": torch.ones(4, 3), "way": "cayley"}, "pass start"),
        ({"X": torch.ones(4, 3), "way": "qr", "reduce": torch.clone}, "whole columns"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        retract(**arguments)


def test_tangent_is_a_projection_onto_directions_that_keep_orthonormality():
    U, G = step()
    T = tangent(U, G)
    assert_close(U.mT @ T + T.mT @ U, torch.zeros(4, 6, 6, dtype=U.dtype))
    assert_close(tangent(U, T), T)
    assert_close((T * (G - T)).sum((-2, -1)), torch.zeros(4, dtype=U.dtype), atol=1e-12, rtol=0)


def test_qr_vjp_is_autograd_through_qr():
    A = torch.randn(3, 20, 4, dtype=torch.float64, requires_grad=True)
    Q, R = torch.linalg.qr(A)
    dQ = torch.randn_like(Q)
    (want,) = torch.autograd.grad(Q, A, dQ)
    assert_close(qr_vjp(Q.detach(), R.detach(), dQ), want)
    assert_close((want * A).sum(-2), torch.zeros(3, 4, dtype=A.dtype), atol=1e-12, rtol=0)  # columns' scale is free


def test_qr_vjp_is_the_slope_of_the_frame():
    A = torch.randn(20, 4, dtype=torch.float64)
    Q, R = frame_factor(A)
    dQ, E = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    t = 1e-6
    slope = ((retract(A + t * E) - retract(A - t * E)) / (2 * t) * dQ).sum()
    assert_close((qr_vjp(Q, R, dQ) * E).sum(), slope, rtol=1e-7, atol=1e-8)  # t^2 and eps / t
