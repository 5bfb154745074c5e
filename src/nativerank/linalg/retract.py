"""Back to orthonormal columns: factorizations X = Q R with Q^T Q = I, and what belongs to them.

    X: (..., d, r) with d >= r, Q: (..., d, r), R: (..., r, r)
    way        R                                       Q
    qr         upper triangular, diagonal >= 0         Householder QR, signs fixed, one matrix after the other
    cholesky   the same R, by Cholesky of X^T X        X R^-1
    polar      symmetric, >= 0: (X^T X)^(1/2)          X R^-1, the frame nearest to X
    cayley     -                                       (I + K/2)^-1 (I - K/2) U, K = P D U^T - U D^T P, P = I - U U^T/2

Every way is a retraction: for D tangent to U, U - t D becomes U - t D + O(t^2). For other D polar and cayley give
U - t tangent(U, D) + O(t^2); a triangular R leaves U - t (D - U N), N upper triangular, which has a rotation within the
span of U that D did not ask for. `cholesky` and `polar` take one Gram matrix and one product, 4 d r^2 FLOPs and O(r^3).
Rounding in X^T X grows with the condition number; r x r matrices tell by how
much. Where it would pass `LIMIT`, that matrix alone is done again in float64, and where float64 does not suffice
(rank-deficient, zero, out of range) by Householder QR or SVD, which complete the frame. So |Q^T Q - I| stays below
1e-5 in float32 for every finite X. Asking whether any matrix of the stack needs that is the one time the host waits for
a GPU. MPS has no float64: there the careful part runs on the CPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nativerank.linalg.gram import (
    PANEL,
    Reduce,
    at_least_float32,
    full_precision,
    gram,
    split_finite,
    symmetric_product,
    to_float64,
)

Pair = tuple[Tensor, Tensor]

TRIANGULAR = ("qr", "cholesky")  # ways whose R is upper triangular
WAYS = (*TRIANGULAR, "polar", "cayley")

LIMIT = {torch.float32: 4e-6, torch.float64: 1e-13}  # of the error expected in Q^T Q
ROUNDING = 8.0  # error of Q^T Q in units of eps times the growth of rounding; measured up to d = 28672, r = 512
NEWTON_STEPS = 8  # enough where one pass in float32 is; else the eigenvalues do it


def frame_factor(X: Tensor, way: str = "cholesky", reduce: Reduce | None = None) -> Pair:
    """(Q, R) with X = Q R, Q in X's dtype and R in float32 at least; both NaN where X is not finite.

    Args:
        X: stack of tall matrices; with `reduce`, this process's rows of it.
        way: "qr", "cholesky" (the same up to rounding) or "polar".
        reduce: sums Gram matrices over the processes that hold the other rows. There float64 too promises no more than
            LIMIT of float32 for ill-conditioned X, and X beyond that (condition above 1e4) is an error, on all
            processes alike.

    Raises:
        ValueError: unknown way, X not tall, or what shards cannot do.
    """
    if way not in ("qr", "cholesky", "polar"):
        raise ValueError(f"a frame is found by qr, cholesky or polar, got {way!r}")
    if reduce is None and X.shape[-2] < X.shape[-1]:
        raise ValueError(f"a frame needs at least as many rows as columns, got {tuple(X.shape)}")
    if reduce and way == "qr":
        raise ValueError("qr needs whole columns: use cholesky, which gives the same frame, on sharded rows")
    Y = at_least_float32(X)
    limit = LIMIT[torch.float32 if reduce else Y.dtype]
    Q, R = _householder(Y) if way == "qr" else _by_gram(Y, way, reduce, limit)
    return Q.to(X.dtype), R


def retract(X: Tensor, way: str = "cholesky", start: Tensor | None = None, reduce: Reduce | None = None) -> Tensor:
    """The frame Q (..., d, r) that X is brought back to, in X's dtype.

    Args:
        X: stack of tall matrices, frames after a step.
        way: "qr", "cholesky", "polar" or "cayley".
        start: the frames before the step; cayley needs them.
        reduce: as in `frame_factor`.
    """
    if way != "cayley":
        return frame_factor(X, way, reduce)[0]
    if start is None:
        raise ValueError("cayley needs the frame before the step: pass start")
    return _cayley(at_least_float32(start), at_least_float32(X), reduce).to(X)


def tangent(Q: Tensor, G: Tensor, reduce: Reduce | None = None) -> Tensor:
    """G - Q sym(Q^T G): the part of G (..., d, r) along which the frames Q stay orthonormal to first order."""
    with full_precision(Q.device):
        C = _summed(Q.mT @ G, reduce)
        return G - Q @ ((C + C.mT) / 2)


def qr_vjp(Q: Tensor, R: Tensor, dQ: Tensor, reduce: Reduce | None = None) -> Tensor:
    """dA (..., d, r), the gradient of a loss in A = Q R, from its gradient dQ in Q alone.

        dA = (dQ - Q S) R^-T,   S = T + T^T - diag(T),   T = triu(Q^T dQ)

    R is upper triangular and invertible.
    """
    with full_precision(Q.device):
        T = _summed(Q.mT @ dQ, reduce).triu()
        S = T + T.triu(1).mT
        inverse = torch.linalg.solve_triangular(R.mT, _identity(R), upper=False)  # R^-T
        return dQ @ inverse - Q @ (S @ inverse)


def _summed(x: Tensor, reduce: Reduce | None) -> Tensor:
    return reduce(x) if reduce else x


def _identity(R: Tensor) -> Tensor:
    return torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)


def _householder(X: Tensor) -> Pair:
    """Sign-fixed QR; a zero on the diagonal of R keeps its column of Q."""
    X, finite = _finite(X)
    Q, R = torch.linalg.qr(X.cpu() if X.device.type == "mps" else X)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(R.dtype)  # (..., r)
    Q, R = (Q * sign.unsqueeze(-2)).to(X.device), (sign.unsqueeze(-1) * R).to(X.device)
    return _nan_unless(finite, Q), _nan_unless(finite, R)


def _singular(X: Tensor) -> Pair:
    """Polar factors by SVD, which completes the frame of a rank-deficient X."""
    X, finite = _finite(X)
    P, s, Zh = torch.linalg.svd(X, full_matrices=False)
    return _nan_unless(finite, P @ Zh), _nan_unless(finite, Zh.mT @ (s.unsqueeze(-1) * Zh))


def _finite(X: Tensor) -> tuple[Tensor, Tensor]:
    """(X with zeros in the place of matrices that are not finite, which of them (...) are)."""
    finite = X.isfinite().all(-1).all(-1)
    return _unless(finite, X, 0.0), finite


def _nan_unless(finite: Tensor, X: Tensor) -> Tensor:
    return _unless(finite, X, torch.nan)


def _unless(finite: Tensor, X: Tensor, value: float) -> Tensor:
    clean = X.device.type == "cpu" and bool(finite.all())  # asking a GPU would make the host wait
    return X if clean else X.masked_fill(~finite[..., None, None], value)


def _by_gram(X: Tensor, way: str, reduce: Reduce | None, limit: float) -> Pair:
    """(X R^-1, R); again with more digits for the matrices of the stack that need them."""
    G = gram(X, reduce)
    G = G.cpu() if G.device.type == "mps" else G
    R, inverse = _roots(way, X.dtype)(G)
    growth = _growth(G, inverse)
    poor = ~(growth * (ROUNDING * torch.finfo(X.dtype).eps) <= limit).to(X.device)  # NaN is poor too
    R, inverse = R.to(X.device), inverse.to(X.device)
    with full_precision(X.device):
        Q = _triangular_product(X, inverse) if way == "cholesky" else X @ inverse
    if poor.any():
        Q[poor], R[poor] = _careful(X[poor], way, reduce, limit)
    return Q, R


def _roots(way: str, dtype: torch.dtype) -> Callable[[Tensor], Pair]:
    if way == "cholesky":
        return _triangular_root
    return _newton_root if dtype == torch.float32 else _eigen_root


def _careful(X: Tensor, way: str, reduce: Reduce | None, limit: float) -> Pair:
    """What one pass in float32 cannot do, in float64; what float64 cannot do, without a Gram matrix."""
    if X.dtype == torch.float32:
        Q, R = _by_gram(to_float64(X), way, reduce, limit)
        return Q.to(X), R.to(X)
    if reduce is None:
        return _householder(X) if way == "cholesky" else _singular(X)
    if gram(X, reduce).diagonal(dim1=-2, dim2=-1).isfinite().all():
        raise ValueError(f"sharded rows of a matrix that has lost its rank cannot be made a frame: {tuple(X.shape)}")
    return X * torch.nan, gram(X, reduce) * torch.nan


def _growth(G: Tensor, inverse: Tensor) -> Tensor:
    """How much X R^-1 magnifies rounding in X^T X, (...); infinite where R^-1 was not found, or squares underflowed.

    The error of Q^T Q is R^-T E R^-1 with |E_ij| of the order of eps |x_i| |x_j|. Roundings of either sign add up to
    eps max_j sum_i |x_i|^2 (R^-1_ij)^2; scaling a column of X by itself changes nothing.
    """
    info, squares = torch.finfo(G.dtype), G.diagonal(dim1=-2, dim2=-1)
    growth = (squares.unsqueeze(-2) @ inverse.square()).amax((-2, -1))
    return growth.masked_fill(squares.amin(-1) < info.tiny / info.eps, torch.inf)


def _triangular_root(G: Tensor) -> Pair:
    """(R, R^-1) with R^T R = G, R upper triangular; R^-1 infinite where G is not positive definite."""
    L, info = torch.linalg.cholesky_ex(G)
    R = L.mT
    return R, _triangular_inverse(R).masked_fill((info != 0)[..., None, None], torch.inf)


def _triangular_inverse(R: Tensor) -> Tensor:
    """R^-1 of upper triangular R, by halves: products, which are faster than one large solve."""
    half = R.shape[-1] // 2
    if half < PANEL // 2:
        return torch.linalg.solve_triangular(R, _identity(R), upper=True)
    first, second = slice(None, half), slice(half, None)
    inverse = torch.zeros_like(R)
    inverse[..., first, first] = _triangular_inverse(R[..., first, first])
    inverse[..., second, second] = _triangular_inverse(R[..., second, second])
    corner = R[..., first, second] @ inverse[..., second, second]
    inverse[..., first, second] = -(inverse[..., first, first] @ corner)
    return inverse


def _triangular_product(X: Tensor, T: Tensor) -> Tensor:
    """X T with T upper triangular; on a CPU, where narrow products are fast, without most of the zeros."""
    r = X.shape[-1]
    if X.device.type != "cpu" or r < 2 * PANEL:
        return X @ T
    out = torch.empty_like(X)
    for x, t, q in zip(X.view(-1, *X.shape[-2:]), T.view(-1, r, r), out.view(-1, *X.shape[-2:]), strict=True):
        for i in range(0, r, PANEL):
            torch.mm(x[:, : i + PANEL], t[: i + PANEL, i : i + PANEL], out=q[:, i : i + PANEL])
    return out


def _newton_root(G: Tensor) -> Pair:
    """(H, H^-1) with H = G^(1/2), by the coupled Newton-Schulz iteration; H^-1 infinite where that is slow.

    Y -> Y T, Z -> T Z, T = (3 I - Z Y) / 2 from Y = G / c, Z = I has limits (G / c)^(1/2) and its inverse where the
    eigenvalues of G / c lie in (0, 3). The last step takes Z G / c for Y, which sheds the rounding of the others. All
    are polynomials of G, so products are symmetric.
    """
    I = _identity(G)
    mean = G.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    near = torch.linalg.matrix_norm(G / mean - I, keepdim=True) < 1
    c = torch.where(near, mean, G.abs().sum(-1).amax(-1)[..., None, None])  # row sums bound the largest eigenvalue
    Y, Z = G / c, I.expand_as(G)
    with full_precision(G.device):
        for step in range(NEWTON_STEPS):
            T = 1.5 * I - 0.5 * (symmetric_product(Z, Y) if step else Y)
            Z = symmetric_product(T, Z) if step else T
            done = torch.linalg.matrix_norm(T - I) < 1e-2  # squared by the step just made, and again by the last
            if G.device.type == "cpu" and bool(done.all()):
                break
            Y = symmetric_product(Y, T)
        T = 1.5 * I - 0.5 * symmetric_product(Z, symmetric_product(G / c, Z))
        inverse = symmetric_product(T, Z) * c.rsqrt()
        return symmetric_product(G, inverse), inverse.masked_fill(~done[..., None, None], torch.inf)


def _eigen_root(G: Tensor) -> Pair:
    """(H, H^-1) with H = G^(1/2), by eigenvalues; H^-1 infinite where one is not positive."""
    G, finite = split_finite(G)
    values, V = torch.linalg.eigh(G)
    bad = ~finite | (values[..., 0] <= 0)
    root = values.clamp_min(torch.finfo(G.dtype).tiny).sqrt().unsqueeze(-2)
    return (V * root) @ V.mT, ((V / root) @ V.mT).masked_fill(bad[..., None, None], torch.inf)


def _cayley(U: Tensor, X: Tensor, reduce: Reduce | None) -> Tensor:
    """The Cayley transform of the step D = U - X, then `polar` against rounding and drift of U itself.

    With M = U^T D and N = D - U M,  K = U skew(M) U^T + N U^T - U N^T, and in the span of U and N
        Q = (2 U - N) (I + H)^-1 - U,   H = skew(M) / 2 + N^T N / 4
    which is the Sherman-Morrison-Woodbury form reduced from 2r x 2r to r x r. H is a skew matrix plus a semidefinite
    one, so I + H has an inverse. Steps so long that float32 cannot square them are done in float64.
    """
    D = U - X
    with full_precision(U.device):
        M = _summed(U.mT @ D, reduce)
        N = D - U @ M
        H = (M - M.mT) / 4 + gram(N, reduce) / 4
        on_host = H.cpu() if H.device.type == "mps" else H
        # No LU: batched LU of PyTorch 2.13 with MKL fails in a process that has gone from one thread to two.
        P, T = torch.linalg.qr(_identity(on_host) + on_host)
        inverse = torch.linalg.solve_triangular(T, P.mT, upper=True).to(H.device)
        Q = (2 * U - N) @ inverse - U
    lost = ~inverse.isfinite().all(-1).all(-1)
    if U.dtype == torch.float32 and lost.any():
        Q[lost] = _cayley(to_float64(U[lost]), to_float64(X[lost]), reduce).to(Q)
    return frame_factor(Q, "polar", reduce)[0]
