"""Which rank a spectrum asks for: to shrink, to grow, or to stay. E(r) is `linalg.energy`'s share of ||W||_F^2.

shrink   to the smallest r' with E(r') >= threshold, rounded up to a multiple, if that saves the share `hysteresis`.
grow     The truncated spectrum cannot show what lies beyond it, but it shows how fast it decays. With n columns to be
         added, e_1 the energy of the last n columns and e_2 that of the n before them, the next n would hold

             e_0 = e_1^2 / e_2        (geometric decay; e_0 = n s_r^2 where there are fewer than 2 n columns)

         and the energy rule, asked about the spectrum continued so, wants more columns than there are if

             sum s^2 / (sum s^2 + e_0) < threshold.

         A flat spectrum is grown, a decayed one is not, and neither is one whose youngest columns are still empty: a
         matrix grows as long as it uses what it was given.

Growth that was not used, that is dropped again, sets the matrix's limit to what it shrank to.
"""

from torch import Tensor

from nativerank.config import AdaptConfig
from nativerank.layers.rank import break_even_rank
from nativerank.linalg.energy import energies, energy_rank


def growth_limit(d_in: int, d_out: int, largest: int | None) -> int:
    """The rank beyond which a matrix does not grow: `largest`, or the last one that saves something."""
    below = -int(-break_even_rank(d_in, d_out) // 1) - 1
    return min(d_in, d_out, below if largest is None else largest)


def next_rank(spectrum: Tensor, limit: int, adapt: AdaptConfig, name: str = "matrix") -> int:
    """The rank for the matrix with these r singular values (..., r).

    Args:
        spectrum: of one matrix, or of a stack that has one rank.
        limit: it does not grow beyond.
        adapt: with a threshold.
        name: of the matrix, for messages.

    Raises:
        ValueError: a spectrum that is not finite.
    """
    assert adapt.threshold is not None
    rank, m = spectrum.shape[-1], adapt.multiple
    wanted = max(energy_rank(spectrum, adapt.threshold, name), adapt.min)
    wanted = -(-wanted // m) * m
    slack = adapt.hysteresis if adapt.mode == "schedule" else 0.0  # a choice made once cannot go to and fro
    if wanted < rank and wanted <= rank * (1 - slack):
        return wanted
    target = min((rank + max(m, int(adapt.grow * rank))) // m * m, limit)
    if adapt.grow and target > rank and foreseen_energy(energies(spectrum, name), target - rank) < adapt.threshold:
        return target
    return rank


def foreseen_energy(squares: Tensor, count: int) -> float:
    """E(r) of the r squares (r,), descending, if `count` more followed with the decay of the last ones; 1 of zeros."""
    total, r = squares.sum().item(), squares.shape[0]
    last = squares[-count:].sum().item()
    if r >= 2 * count:
        before = squares[-2 * count : -count].sum().item()
        missing = last**2 / before if before > 0 else 0.0
    else:
        missing = count * squares[-1].item()
    return total / (total + missing) if total > 0 else 1.0
