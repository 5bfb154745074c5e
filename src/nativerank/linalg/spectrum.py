"""Singular values of a product of thin factors, without the product.

    W = A B^T,  A (..., m, r), B (..., n, r);   S_A^T S_A = A^T A, S_B^T S_B = B^T B   ->   sigma(W) = sigma(S_A S_B^T)

Two float64 Gram matrices and one r x r SVD: O((m + n) r^2 + r^3) instead of O(m n min(m, n)).
Values below about 1e-8 ||A|| ||B|| are lost to rounding.
"""

import torch
from torch import Tensor

from nativerank.linalg.gram import Reduce, gram_root, split_finite


def product_spectrum(A: Tensor, B: Tensor, reduce: Reduce | None = None) -> Tensor:
    """The r largest singular values (..., r) of A B^T, descending, in float64; NaN where a factor is not finite.

    Args:
        A: (..., m, r).
        B: (..., n, r).
        reduce: sums Gram matrices over the processes that hold the other rows of A and B.
    """
    S, finite = split_finite(gram_root(A, reduce) @ gram_root(B, reduce).mT)
    return torch.linalg.svdvals(S).masked_fill(~finite[..., None], torch.nan)


def stable_rank(spectrum: Tensor) -> Tensor:
    """||W||_F^2 / ||W||_2^2 from singular values (..., r); 0 for a zero matrix. Between 1 and the rank otherwise."""
    squares = spectrum.square()
    largest = squares.amax(-1)
    return torch.where(largest > 0, squares.sum(-1) / largest.clamp_min(torch.finfo(squares.dtype).tiny), 0.0)
