"""How factors turn a change of themselves into a change of W: the singular values of that linear map, exactly.

    pair     (dA, dB) -> dA B^T + A dB^T                      sqrt(a_i^2 + b_j^2) within both spans,
                                                              b_j (d_out - r times) and a_i (d_in - r times) beyond
    triple   (dU, ds, dV) -> d(U diag(s) V^T), tangent        1 for s, (s_i +- s_j) / sqrt(2), i < j, within,
                                                              s_j (d_out + d_in - 2 r times) beyond

a, b are singular values of A, B, and s stands for |s|. Gradients in the factors are the adjoint map's image of the
gradient in W, and where the loss is quadratic in W its Hessian in the factors is made of the squares. Proofs are in
docs/math.md. Costs two float64 Gram matrices and their eigenvalues.
"""

import torch
from torch import Tensor

from nativerank.linalg.spectrum import singular_values

Extremes = tuple[Tensor, Tensor]  # smallest and largest (...)


def pair_extremes(A: Tensor, B: Tensor) -> Extremes:
    """Of A (..., d_out, r), B (..., d_in, r) of full rank; directions of the gauge, whose image is 0, do not count."""
    r, a, b = A.shape[-1], singular_values(A), singular_values(B)
    both = (a[..., -1].square() + b[..., -1].square()).sqrt()
    beyond = [x[..., -1] for x, d in ((b, A.shape[-2]), (a, B.shape[-2])) if d > r]
    smallest = torch.stack([both, *beyond]).amin(0)
    return smallest, (a[..., 0].square() + b[..., 0].square()).sqrt()


def frame_extremes(s: Tensor) -> Extremes:
    """Beyond the spans of frames with s (..., r): |s_j|, by which every direction but r^2 of them is scaled."""
    s = s.double().abs()
    return s.amin(-1), s.amax(-1)


def smallest_turn(s: Tensor) -> Tensor:
    """The smallest scale within the spans, min |s_i - s_j| / sqrt(2) (...); infinite for a single column.

    U and V turned alike, which at equal s leaves W as it is: the gauge of U diag(s) V^T there.
    """
    ordered = s.double().abs().sort(-1).values
    gaps = ordered.diff(dim=-1) / 2**0.5
    return gaps.amin(-1) if s.shape[-1] > 1 else torch.full_like(ordered[..., 0], torch.inf)


def balanced_condition(sigma: Tensor) -> Tensor:
    """sqrt(2 sigma_1 / sigma_r) (...) of a spectrum (..., r): the best that any pair with this product can have.

    For d_out, d_in > r: a_1 b_1 >= sigma_1 and a_r b_r <= sigma_r, so (a_1^2 + b_1^2) / min(a_r^2, b_r^2) is at least
    2 sigma_1 / sigma_r, and A = U sqrt(S), B = V sqrt(S) reaches it.
    """
    return (2 * sigma.amax(-1) / sigma.amin(-1)).sqrt()
