"""The spectral norm of what a step did to a product of thin factors, without the product.

    W = A B^T,  A (..., m, r), B (..., n, r)  ->  W' = A' B'^T
    dW = W' - W = dA B'^T + A dB^T = [dA, A] [B', dB]^T        dA = A' - A,  dB = B' - B
    [dA, A] = Q_1 R_1,  [B', dB] = Q_2 R_2   ->   ||dW||_2 = ||R_1 R_2^T||_2

No difference of products is taken, so nothing cancels: in float64 dA and dB are exact for float32 factors, a
Householder QR keeps columns of very different size apart, and the result is good to about 1e-15 (||dA|| ||B|| +
||A|| ||dB||) however small dW is beside W. Costs two QR decompositions without Q, 8 (m + n) r^2 FLOPs, and O(r^3).
"""

import torch
from torch import Tensor

from nativerank.linalg.gram import to_float64
from nativerank.linalg.norms import spectral_norm


def update_norm(A: Tensor, B: Tensor, A_new: Tensor, B_new: Tensor) -> Tensor:
    """||A_new B_new^T - A B^T||_2 (...) in float64; NaN where a factor is not finite.

    MPS has no float64, so there it runs on the CPU.

    Args:
        A, A_new: (..., m, r), before and after.
        B, B_new: (..., n, r), before and after.
    """
    A, B, A_new, B_new = map(to_float64, (A, B, A_new, B_new))
    return product_norm(torch.cat([A_new - A, A], -1), torch.cat([B_new, B_new - B], -1))


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """||left right^T||_2 (...) of left (..., m, k) and right (..., n, k) in float64; NaN where one is not finite."""
    finite = left.isfinite().all(-1).all(-1) & right.isfinite().all(-1).all(-1)
    R_left, R_right = (
        torch.linalg.qr(X.masked_fill(~finite[..., None, None], 0.0), mode="r").R for X in (left, right)
    )  # (..., min(m, k), k), (..., min(n, k), k)
    return spectral_norm(R_left @ R_right.mT).masked_fill(~finite, torch.nan)
