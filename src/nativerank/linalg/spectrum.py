"""Singular values of a product of thin factors, without the product.

    W = A B^T,  A (..., m, r), B (..., n, r);   S_A^T S_A = A^T A, S_B^T S_B = B^T B   ->   sigma(W) = sigma(S_A S_B^T)

Two float64 Gram matrices and one r x r SVD: O((m + n) r^2 + r^3) instead of O(m n min(m, n)).
Values below about 1e-8 ||A|| ||B|| are lost to rounding.
"""

import torch
from torch import Tensor

from nativerank.linalg.gram import Reduce, gram, split_finite, symmetric_root, to_float64


def product_spectrum(A: Tensor, B: Tensor, reduce: Reduce | None = None) -> Tensor:
    """The r largest singular values (..., r) of A B^T, descending, in float64; NaN where a factor is not finite.

    Args:
        A: (..., m, r).
        B: (..., n, r).
        reduce: sums Gram matrices over the processes that hold the other rows of A and B.
    """
    return spectrum_of_grams(gram(to_float64(A), reduce), gram(to_float64(B), reduce))


def spectrum_of_grams(G_A: Tensor, G_B: Tensor) -> Tensor:
    """`product_spectrum` from the float64 Gram matrices (..., r, r) of both factors."""
    S, finite = split_finite(symmetric_root(G_A) @ symmetric_root(G_B).mT)
    return torch.linalg.svdvals(S).masked_fill(~finite[..., None], torch.nan)


def spectral_form(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A B^T = U diag(s) V^T with orthonormal U (..., m, r) and V (..., n, r), s (..., r) descending and >= 0.

    A = Q_A R_A, B = Q_B R_B, R_A R_B^T = P diag(s) Z^T, U = Q_A P, V = Q_B Z, all in float64. The largest entry of each
    column of U is positive, so that equal input gives equal output on any LAPACK.
    """
    Q_A, R_A = torch.linalg.qr(to_float64(A))
    Q_B, R_B = torch.linalg.qr(to_float64(B))
    P, s, Zh = torch.linalg.svd(R_A @ R_B.mT)
    U, V = Q_A @ P, Q_B @ Zh.mT
    peak = U.gather(-2, U.abs().argmax(-2, keepdim=True))  # (..., 1, r)
    sign = torch.where(peak < 0, -1.0, 1.0)
    return U * sign, s, V * sign


def singular_values(X: Tensor) -> Tensor:
    """All singular values (..., min(m, n)) of a dense X (..., m, n), descending, in float64; NaN where not finite.

    From the Gram matrix of the short side: a quarter of an SVD's time, and values below about 1e-8 of the largest
    are lost.
    """
    X = to_float64(X)
    G, finite = split_finite(gram(X if X.shape[-2] >= X.shape[-1] else X.mT))
    return torch.linalg.eigvalsh(G).clamp_min(0).sqrt().flip(-1).masked_fill(~finite[..., None], torch.nan)


def stable_rank(spectrum: Tensor) -> Tensor:
    """||W||_F^2 / ||W||_2^2 from a spectrum, singular values (..., r); 0 for a zero matrix, else 1 to the rank."""
    squares = spectrum.square()
    largest = squares.amax(-1)
    return torch.where(largest == 0, 0.0, squares.sum(-1) / largest.clamp_min(torch.finfo(squares.dtype).tiny))
