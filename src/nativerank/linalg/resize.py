"""Factors of the same W at another rank, and what that does to their gradients. W is never formed.

    pair      W = A B^T,  A = Q_A R_A,  B = Q_B R_B,  R_A R_B^T = P diag(s) Z^T,  of which the k leading columns stay:
                  A' = Q_A P_k sqrt(s_k) = A T_A,    T_A = R_B^T Z_k / sqrt(s_k)
                  B' = Q_B Z_k sqrt(s_k) = B T_B,    T_B = R_A^T P_k / sqrt(s_k)
              balanced, whatever the factors were before.  ||dW||_F^2 = sum of the dropped s^2
    frames    W = U diag(s) V^T with orthonormal U, V: the k columns with the largest |s| stay, in their order
    growth    appends columns and touches nothing else, so W does not change: A gets zeros, or s does

The gradient of A is G B and that of B is G^T A, where G is the gradient of W. So G_A becomes G_A T_B, G_B becomes
G_B T_A, and so does every average of them; a new column has no past, and its column of T is zero.
All but the thin products is r x r, and in float64. Cost O((d_out + d_in) r^2 + r^3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nativerank.linalg.gram import to_float64

NUMERICAL_RANK = 1e-7  # of s_1: what float32 factors cannot tell from zero


class Side(NamedTuple):
    """One factor at another rank.

    X (..., d, r'), or (r') of a spectrum s. T (..., r, r'): its gradient G (..., d, r) becomes G T.
    top (..., d): the leading left singular vector of X, where that is another one now.
    free: W does not depend on new columns yet, however they move: those of frames, as long as their s is 0.
    partner: squared lengths of the other factor's columns before (..., r) and after (..., r'), where T mixes columns:
    the gradient of A is G B, so they say how large its columns are.
    """

    X: Tensor
    T: Tensor
    top: Tensor | None = None
    free: bool = False
    partner: tuple[Tensor, Tensor] | None = None


class Resized(NamedTuple):
    """A parameter whose columns became others, which its optimizer state has to follow; the rest as in `Side`.

    down: it is stored as X^T, so that the rank is its last dimension but one.
    """

    parameter: Tensor
    T: Tensor
    top: Tensor | None = None
    free: bool = False
    partner: tuple[Tensor, Tensor] | None = None
    down: bool = False


def resized_pair(A: Tensor, B: Tensor, rank: int, generator: torch.Generator | None = None) -> tuple[Side, Side]:
    """A (..., d_out, r) and B (..., d_in, r) at another rank.

    A direction without energy that stays is zero in A and a unit direction, scaled like its neighbours, in B, as a
    grown one is: two zero columns would get no gradient from each other.

    Args:
        A, B: the factors, or stacks of them.
        rank: at most min(d_out, d_in).
        generator: of new columns, on the CPU.
    """
    if rank > A.shape[-1]:
        return _grown_pair(A, B, rank, generator)
    (Q_A, R_A), (Q_B, R_B) = (torch.linalg.qr(to_float64(X)) for X in (A, B))
    P, s, Zh = torch.linalg.svd(R_A @ R_B.mT)
    P, s, Z = P[..., :rank], s[..., :rank], Zh.mT[..., :rank]
    alive = s > NUMERICAL_RANK * s[..., :1]
    root = torch.where(alive, s, 0.0).sqrt()  # (..., k)
    inverse = torch.where(alive, 1 / root, 0.0)
    rms = (root.square().sum(-1) / alive.sum(-1).clamp_min(1)).sqrt()
    size = torch.where(alive.any(-1), rms, _column_size(A, B))
    U, V, right = Q_A @ P, Q_B @ Z, torch.where(alive, root, size[..., None])
    T_A, T_B = R_B.mT @ Z * inverse[..., None, :], R_A.mT @ P * inverse[..., None, :]
    before = [X.square().sum(-2) for X in (R_A, R_B)]  # squared column lengths of A and B
    side_A = Side((U * root[..., None, :]).to(A), T_B, U[..., 0], partner=(before[1], right.square()))
    return side_A, Side((V * right[..., None, :]).to(B), T_A, V[..., 0], partner=(before[0], root.square()))


def resized_frames(
    U: Tensor, s: Tensor, V: Tensor, rank: int, generator: torch.Generator | None = None
) -> tuple[Side, Side, Side]:
    """U (d_out, r), s (r) and V (d_in, r) at another rank: columns dropped, or orthonormal ones with s = 0 appended."""
    r = s.shape[-1]
    if rank > r:
        T = _first_columns(r, rank, U.device)
        U_new, V_new = (_appended(X, new_directions(X, rank - r, generator)) for X in (U, V))
        s_new = Side(_appended(s, s.new_zeros(rank - r)), T)
        return Side(U_new, T, free=True), s_new, Side(V_new, T, free=True)
    kept = s.abs().argsort(descending=True, stable=True)[:rank].sort().values
    T = _first_columns(r, r, U.device)[:, kept.to(to_float64(s).device)]
    return Side(U[:, kept], T), Side(s[kept], T), Side(V[:, kept], T)


def cropped(X: Tensor, rank: int) -> Side:
    """The first columns of X, or zeros after them: a place of the right shape for numbers that are loaded next."""
    r = X.shape[-1]
    kept = X[..., :rank]
    return Side(_appended(kept, X.new_zeros(*X.shape[:-1], max(0, rank - r))), _first_columns(r, rank, X.device))


def exchange(parameter: Tensor, side: Side, down: bool = False) -> Resized:
    """Gives a parameter, which stays the same object, the numbers of `side`, and its gradient likewise."""
    stored = side.X.mT if down else side.X
    grad, parameter.grad = parameter.grad, None
    # By way of another dtype, for which autograd makes a new accumulator: one that an old graph keeps alive (a loss
    # that has not gone out of scope) would go on expecting gradients of the old shape.
    other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
    parameter.data = parameter.new_empty(0, dtype=other)
    parameter.data = stored.contiguous()
    if grad is not None:
        tall = grad.mT if down else grad
        new = (tall.to(side.T) @ side.T).to(grad)
        parameter.grad = (new.mT if down else new).contiguous()
    return Resized(parameter, side.T, side.top, side.free, side.partner, down)


def new_directions(X: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Random orthonormal columns (..., d, count), in float64, orthogonal to those of X (..., d, r); r + count <= d."""
    assert X.shape[-1] + count <= X.shape[-2], "there are no more than d orthogonal directions"
    Q, _ = torch.linalg.qr(to_float64(X))
    N = torch.randn(*X.shape[:-1], count, dtype=torch.float64, generator=generator).to(Q)
    for _ in range(2):  # once leaves what rounding did to the first projection
        N, _ = torch.linalg.qr(N - Q @ (Q.mT @ N))
    return N


def _grown_pair(A: Tensor, B: Tensor, rank: int, generator: torch.Generator | None) -> tuple[Side, Side]:
    """A with zero columns, B with orthogonal ones of the size of its own: both keep their spectral norms."""
    r = A.shape[-1]
    N = new_directions(B, rank - r, generator) * _column_size(A, B)[..., None, None]
    T = _first_columns(r, rank, A.device).expand(*A.shape[:-2], r, rank)
    return Side(_appended(A, A.new_zeros(*A.shape[:-1], rank - r)), T), Side(_appended(B, N), T)


def _column_size(A: Tensor, B: Tensor) -> Tensor:
    """Root mean square length (...) of the columns of B, of those of A where B is zero; in float64."""
    size_A, size_B = (torch.linalg.matrix_norm(to_float64(X)) / X.shape[-1] ** 0.5 for X in (A, B))
    return torch.where(size_B > 0, size_B, size_A)


def _first_columns(r: int, rank: int, device: torch.device) -> Tensor:
    """T (r, r') of columns that stay where they are."""
    return torch.eye(r, rank, dtype=torch.float64, device="cpu" if device.type == "mps" else device)


def _appended(X: Tensor, new: Tensor) -> Tensor:
    return torch.cat([X, new.to(X)], dim=-1)
