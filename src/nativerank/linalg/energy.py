"""Spectral energy: which share of ||W||_F^2 the r leading singular directions hold, and which r a share asks for.

    E(r) = sum_{i<=r} s_i^2 / sum_i s_i^2,      rank of a threshold t: the smallest r with E(r) >= t

Dropping all but r directions changes W by ||dW||_F^2 = (1 - E(r)) ||W||_F^2, so a threshold of 0.99 allows a relative
change of 0.1. A stack of matrices (experts) has one rank for all and is read as one block-diagonal matrix: the energy
of its r leading directions of every block.
"""

import torch
from torch import Tensor

ROUNDING = 1e-12  # share of the energy that is rounding: of float64 sums, and of weights that were stored in float32


def check_threshold(threshold: float, name: str = "energy") -> None:
    """Raises a ValueError unless the threshold lies in (0, 1]."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {threshold!r}")


def energies(spectrum: Tensor, name: str = "matrix") -> Tensor:
    """s_i^2 (r,) in float64, descending, summed over a stack.

    Args:
        spectrum: singular values (..., r) in any order and of any sign.
        name: of the matrix, for the message.

    Raises:
        ValueError: a value that is not finite.
    """
    if not bool(torch.isfinite(spectrum).all()):
        raise ValueError(f"{name}: a factor holds NaN or infinity, so its spectrum says nothing about its rank")
    squares = spectrum.detach().cpu().double().square().sort(-1, descending=True).values
    return squares.reshape(-1, squares.shape[-1]).sum(0)


def kept_energy(spectrum: Tensor, rank: int, name: str = "matrix") -> float:
    """E(rank); 1 for a zero matrix, of which nothing can be lost."""
    squares = energies(spectrum, name)
    total = squares.sum()
    return (squares[:rank].sum() / total).item() if total > 0 else 1.0


def energy_rank(spectrum: Tensor, threshold: float, name: str = "matrix") -> int:
    """The smallest r >= 1 with E(r) >= threshold up to ROUNDING; 1 for a zero matrix.

    Args:
        spectrum: singular values (..., r) in any order and of any sign.
        threshold: share of the energy, in (0, 1].
        name: of the matrix, for the message.

    Raises:
        ValueError: a threshold outside (0, 1], or a spectrum that is not finite.
    """
    check_threshold(threshold)
    cumulative = energies(spectrum, name).cumsum(0)
    # Compared with the last partial sum itself, so that a threshold of 1 is met by r at the latest.
    return min(int((cumulative < (threshold - ROUNDING) * cumulative[-1]).sum()) + 1, spectrum.shape[-1])
