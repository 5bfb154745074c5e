"""The spectrum of a dense matrix, and its truncation once a rank is chosen, from one decomposition.

    W (m, n), m <= n:    W W^T = P diag(s^2) P^T,    W_r = P_r P_r^T W

The Gram matrix of the short side in float64 stands in for an SVD: P is orthonormal to 1e-15 however small s is, so
W_r = P_r (P_r^T W) is the best rank-r matrix up to 1e-13 of its distance, while values of s below 1e-8 of the largest
are lost, which no energy notices. LAPACK's float32 SVD rebuilds W to 1e-5, and takes three times as long at (1024,
4096) on one core. What is lost is ||W - W_r||^2 = (1 - E(r)) ||W||^2 with E of `nativerank.linalg.energy`.
Cost: m^2 n + O(m^3), then 2 m n r for the factors of rank r.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nativerank.linalg.gram import to_float64


@dataclass(frozen=True)
class Decomposition:
    """What is known of W (d_out, d_in) before its rank is: `decompose` makes it.

    Args:
        W: the matrix, float64.
        frame: (m, m), eigenvectors of the Gram matrix of its short side, by falling eigenvalue.
        spectrum: (m,), the singular values, descending.
    """

    W: Tensor
    frame: Tensor
    spectrum: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (d_out, r), B (d_in, r) in float64, A B^T = W_r, column i of both of norm sqrt(s_i).

        The largest entry of each column of A is positive, so equal input gives equal factors on any LAPACK.
        """
        P = self.frame[:, :rank]
        left = self.W.shape[0] <= self.W.shape[1]  # whether P holds the left singular vectors
        scaled = (self.W.mT if left else self.W) @ P  # (n, r), column i of norm s_i
        root = torch.linalg.vector_norm(scaled, dim=0).sqrt()
        P, scaled = P * root, scaled / root.clamp_min(torch.finfo(root.dtype).tiny)
        A, B = (P, scaled) if left else (scaled, P)
        peak = A.gather(0, A.abs().argmax(dim=0, keepdim=True))  # (1, r)
        sign = torch.where(peak < 0, -1.0, 1.0)
        return A * sign, B * sign


def decompose(W: Tensor) -> Decomposition:
    """The decomposition of a finite W (d_out, d_in) of any dtype."""
    W = to_float64(W)
    squares, frame = torch.linalg.eigh(W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W)
    return Decomposition(W, frame.flip(-1), squares.clamp_min(0).sqrt().flip(-1))
