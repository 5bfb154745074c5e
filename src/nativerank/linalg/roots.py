"""Roots R of Gram matrices, R^T R = G, with their inverses: X R^-1 has orthonormal columns where G = X^T X.

    cholesky   R upper triangular, diagonal > 0             by Cholesky, the inverse by halves
    polar      R symmetric: G^(1/2)                         by Newton-Schulz in float32, by eigenvalues in float64

Costs O(r^3). What rounding in G does to X R^-1 can be told from G and R^-1 alone (`growth`), so whoever has only sums
over processes knows as much as who has X.
"""

import torch
from torch import Tensor

from nativerank.linalg.gram import PANEL, full_precision, split_finite, symmetric_product
from nativerank.linalg.host import anywhere, asks_for_free

Pair = tuple[Tensor, Tensor]

LIMIT = {torch.float32: 4e-6, torch.float64: 1e-13}  # of the error expected in Q^T Q
ROUNDING = 8.0  # error of Q^T Q in units of eps times the growth of rounding; measured up to d = 28672, r = 512
NEWTON_STEPS = 8  # enough where one pass in float32 is; else the eigenvalues do it


def gram_root_and_inverse(
    G: Tensor, way: str, limit: float, squares: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(R, R^-1, good) of G (..., r, r): good (...) where X R^-1 is expected to be a frame up to `limit`.

    Args:
        G: X^T X, in float32 or float64.
        way: "cholesky" or "polar".
        limit: of the error of Q^T Q. NaN is never good.
        squares: (..., r), the size of what G's diagonal was made of, where that is not a sum of squares.
    """
    if way == "cholesky":
        R, inverse = _triangular_root(G)
    else:
        R, inverse = _newton_root(G) if G.dtype == torch.float32 else _eigen_root(G)
    return R, inverse, growth(G, inverse, squares) * (ROUNDING * torch.finfo(G.dtype).eps) <= limit


def identity(R: Tensor) -> Tensor:
    """I (r, r) like R."""
    return torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)


def growth(G: Tensor, inverse: Tensor, squares: Tensor | None = None) -> Tensor:
    """How much X R^-1 magnifies rounding in X^T X, (...); infinite where R^-1 was not found, or squares underflowed.

    The error of Q^T Q is R^-T E R^-1 with |E_ij| of the order of eps |x_i| |x_j|. Roundings of either sign add up to
    eps max_j sum_i |x_i|^2 (R^-1_ij)^2; scaling a column of X by itself changes nothing.
    """
    info, diagonal = torch.finfo(G.dtype), G.diagonal(dim1=-2, dim2=-1)
    squares = diagonal if squares is None else squares
    worst = (squares.unsqueeze(-2) @ inverse.square()).amax((-2, -1))
    return worst.masked_fill(diagonal.amin(-1) < info.tiny / info.eps, torch.inf)


def _triangular_root(G: Tensor) -> Pair:
    """(R, R^-1) with R^T R = G, R upper triangular; R^-1 infinite where G is not positive definite."""
    L, info = torch.linalg.cholesky_ex(G)
    R = L.mT
    return R, triangular_inverse(R).masked_fill((info != 0)[..., None, None], torch.inf)


def triangular_inverse(R: Tensor) -> Tensor:
    """R^-1 of upper triangular R, by halves: products, which are faster than one large solve."""
    half = R.shape[-1] // 2
    if half < PANEL // 2:
        return torch.linalg.solve_triangular(R, identity(R), upper=True)
    first, second = slice(None, half), slice(half, None)
    inverse = torch.zeros_like(R)
    inverse[..., first, first] = triangular_inverse(R[..., first, first])
    inverse[..., second, second] = triangular_inverse(R[..., second, second])
    corner = R[..., first, second] @ inverse[..., second, second]
    inverse[..., first, second] = -(inverse[..., first, first] @ corner)
    return inverse


def _newton_root(G: Tensor) -> Pair:
    """(H, H^-1) with H = G^(1/2), by the coupled Newton-Schulz iteration; H^-1 infinite where that is slow.

    Y -> Y T, Z -> T Z, T = (3 I - Z Y) / 2 from Y = G / c, Z = I has limits (G / c)^(1/2) and its inverse where the
    eigenvalues of G / c lie in (0, 3). The last step takes Z G / c for Y, which sheds the rounding of the others. All
    are polynomials of G, so products are symmetric.
    """
    I = identity(G)
    mean = G.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    near = torch.linalg.matrix_norm(G / mean - I, keepdim=True) < 1
    c = torch.where(near, mean, G.abs().sum(-1).amax(-1)[..., None, None])  # row sums bound the largest eigenvalue
    Y, Z = G / c, I.expand_as(G)
    with full_precision(G.device):
        for step in range(NEWTON_STEPS):
            T = 1.5 * I - 0.5 * (symmetric_product(Z, Y) if step else Y)
            Z = symmetric_product(T, Z) if step else T
            done = torch.linalg.matrix_norm(T - I) < 1e-2  # squared by the step just made, and again by the last
            if asks_for_free(G) and not anywhere(~done):
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
