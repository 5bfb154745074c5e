"""Which rank a spectrum asks for: to shrink, to grow, or to stay. E(r) is `linalg.energy`'s share of ||W||_F^2.

shrink   to the smallest r' with E(r') >= threshold, rounded up to a multiple, if that saves the share `hysteresis`.
grow     The truncated spectrum cannot show what lies beyond it, but it shows how fast it decays: e_1 is the energy of
         its last n columns, e_2 that of the n before them, q = e_1 / e_2. Continued like that up to the limit of its
         growth, L = r + m n, it would hold

             e = e_1 (q + q^2 + ... + q^m)

         more, and if sum s^2 / (sum s^2 + e) < threshold the energy rule, asked about that spectrum, wants more
         columns than there are. A flat spectrum is grown, a decayed one is not, and neither is one whose youngest
         columns are still empty: a matrix grows as long as it uses what it was given.

Growth that was not used, that is dropped again, sets the matrix's limit to what it shrank to.
"""

from torch import Tensor

from nativerank.config import AdaptConfig
from nativerank.layers.rank import break_even_rank
from nativerank.linalg.energy import energies, energy_rank

BLOCK = 8  # the decay is read off two blocks of an eighth of the columns, or of as many as would be added


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
    if adapt.grow and target > rank:
        block = max(1, min(rank // BLOCK, target - rank))
        if foreseen_energy(energies(spectrum, name), limit, block) < adapt.threshold:
            return target
    return rank


def foreseen_energy(squares: Tensor, limit: int, block: int) -> float:
    """E(r) of the r squares (r,), descending, if they went on to `limit` with the decay of the last two blocks.

    1 for zeros; a single square is taken to go on as it is.
    """
    total, r = squares.sum().item(), squares.shape[0]
    if total == 0:
        return 1.0
    last, before = squares[-block:].sum().item(), squares[-2 * block : -block].sum().item()
    q, m = (last / before if r > 1 else 1.0) if last else 0.0, (limit - r) / block
    return total / (total + last * (m if q == 1 else q * (1 - q**m) / (1 - q)))
