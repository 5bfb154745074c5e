"""Algebra of tall matrices through r x r problems: tensors in, tensors out."""

from nativerank.linalg.change import update_norm
from nativerank.linalg.gram import gram, gram_root
from nativerank.linalg.norms import power_iteration, spectral_norm
from nativerank.linalg.orthogonalize import orthogonalize, orthogonalize_plain, orthogonalizing_factor
from nativerank.linalg.retract import frame_factor, qr_vjp, retract, tangent
from nativerank.linalg.spectrum import product_spectrum, singular_values, stable_rank

__all__ = [
    "frame_factor",
    "gram",
    "gram_root",
    "orthogonalize",
    "orthogonalize_plain",
    "orthogonalizing_factor",
    "power_iteration",
    "product_spectrum",
    "qr_vjp",
    "retract",
    "singular_values",
    "spectral_norm",
    "stable_rank",
    "tangent",
    "update_norm",
]
