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

import torch
from torch import Tensor

from nativerank.linalg.gram import PANEL, Reduce, at_least_float32, full_precision, gram, to_float64
from nativerank.linalg.host import anywhere, asks_for_free
from nativerank.linalg.roots import LIMIT, Pair, gram_root_and_inverse, identity, triangular_inverse

TRIANGULAR = ("qr", "cholesky")  # ways whose R is upper triangular
WAYS = (*TRIANGULAR, "polar", "cayley")


def frame_factor(X: Tensor, way: str = "cholesky", reduce: Reduce | None = None) -> Pair:
    """(Q, R) with X = Q R, Q (..., d, r) in X's dtype, R (..., r, r) in float32 at least; NaN where X is not finite.

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

    Raises:
        ValueError: an unknown way, or cayley without a start.
    """
    if way != "cayley":
        return frame_factor(X, way, reduce)[0]
    if start is None:
        raise ValueError("cayley needs the frame before the step: pass start")
    return _cayley(at_least_float32(start), at_least_float32(X), reduce).to(X)


def tangent(Q: Tensor, G: Tensor, reduce: Reduce | None = None) -> Tensor:
    """G - Q sym(Q^T G): the part of G (..., d, r) along which the frames Q stay orthonormal to first order;
    `reduce` as in `gram`."""
    with full_precision(Q.device):
        C = _summed(Q.mT @ G, reduce)
        return G - Q @ ((C + C.mT) / 2)


def qr_vjp(Q: Tensor, R: Tensor, dQ: Tensor, reduce: Reduce | None = None, inverse: Tensor | None = None) -> Tensor:
    """dA (..., d, r), the gradient of a loss in A = Q R, from its gradient dQ in Q alone.

        dA = (dQ - Q S) R^-T,   S = T + T^T - diag(T),   T = triu(Q^T dQ)

    R is upper triangular and invertible; `inverse` is R^-1 for who has it; `reduce` as in `gram`.
    """
    with full_precision(Q.device):
        T = _summed(Q.mT @ dQ, reduce).triu()
        S = T + T.triu(1).mT
        inverse = (triangular_inverse(R) if inverse is None else inverse).mT  # R^-T
        return dQ @ inverse - Q @ (S @ inverse)


def _summed(x: Tensor, reduce: Reduce | None) -> Tensor:
    return reduce(x) if reduce else x


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
    clean = asks_for_free(X) and not anywhere(~finite)
    return X if clean else X.masked_fill(~finite[..., None, None], value)


def _by_gram(X: Tensor, way: str, reduce: Reduce | None, limit: float) -> Pair:
    """(X R^-1, R); again with more digits for the matrices of the stack that need them."""
    G = gram(X, reduce)
    G = G.cpu() if G.device.type == "mps" else G
    R, inverse, good = gram_root_and_inverse(G, way, limit)
    poor = ~good.to(X.device)
    R, inverse = R.to(X.device), inverse.to(X.device)
    with full_precision(X.device):
        Q = triangular_product(X, inverse) if way == "cholesky" else X @ inverse
    if anywhere(poor):
        Q[poor], R[poor] = _careful(X[poor], way, reduce, limit)
    return Q, R


def _careful(X: Tensor, way: str, reduce: Reduce | None, limit: float) -> Pair:
    """What one pass in float32 cannot do, in float64; what float64 cannot do, without a Gram matrix."""
    if X.dtype == torch.float32:
        Q, R = _by_gram(to_float64(X), way, reduce, limit)
        return Q.to(X), R.to(X)
    if reduce is None:
        return _householder(X) if way == "cholesky" else _singular(X)
    if not anywhere(~gram(X, reduce).diagonal(dim1=-2, dim2=-1).isfinite()):
        raise ValueError(f"sharded rows of a matrix that has lost its rank cannot be made a frame: {tuple(X.shape)}")
    return X * torch.nan, gram(X, reduce) * torch.nan


def triangular_product(X: Tensor, T: Tensor) -> Tensor:
    """X T with T upper triangular; on a CPU, where narrow products are fast, without most of the zeros."""
    r = X.shape[-1]
    if X.device.type != "cpu" or r < 2 * PANEL:
        return X @ T
    out = torch.empty_like(X)
    for x, t, q in zip(X.view(-1, *X.shape[-2:]), T.view(-1, r, r), out.view(-1, *X.shape[-2:]), strict=True):
        for i in range(0, r, PANEL):
            torch.mm(x[:, : i + PANEL], t[: i + PANEL, i : i + PANEL], out=q[:, i : i + PANEL])
    return out


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
        P, T = torch.linalg.qr(identity(on_host) + on_host)
        inverse = torch.linalg.solve_triangular(T, P.mT, upper=True).to(H.device)
        Q = (2 * U - N) @ inverse - U
    lost = ~inverse.isfinite().all(-1).all(-1)
    if U.dtype == torch.float32 and anywhere(lost):
        Q[lost] = _cayley(to_float64(U[lost]), to_float64(X[lost]), reduce).to(Q)
    return frame_factor(Q, "polar", reduce)[0]
