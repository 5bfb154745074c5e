"""Which rank each matrix gets: one number, a ratio or an energy, and what single modules ask for.

    override of the first pattern that fits, else value, else ratio, else energy (at most `value`, if that is given too)

Numbers and ratios are settled, and refused, before any weight is touched. An energy is settled by the spectrum of the
weight, from the decomposition that then gives the factors. Where there is no weight to look at, on the meta device or
in front of random factors, the law of Gaussian matrices stands in: it is what the weight would be drawn from, and all
matrices of one shape get one rank.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from torch import Tensor

from nativerank.layers.discover import Matrix
from nativerank.layers.initialize import gaussian_spectrum
from nativerank.layers.patterns import match_all
from nativerank.layers.rank import DEFAULT_RATIO, check_rank, rank_from_ratio
from nativerank.linalg.energy import check_threshold, energy_rank


class ByEnergy(NamedTuple):
    """A rank that waits for the spectrum: the smallest that keeps this energy, at most cap."""

    energy: float
    cap: int

    def rank(self, spectrum: Tensor) -> int:
        """The rank for singular values (..., min(d)), of a stack for all of it."""
        return min(self.cap, energy_rank(spectrum, self.energy))


def plan_ranks(
    matrices: Mapping[str, Matrix],
    *,
    ratio: float | None = None,
    value: int | None = None,
    energy: float | None = None,
    rule: str = "auto",
    overrides: Mapping[str, int] | None = None,
    weights: bool = True,
) -> dict[str, int | ByEnergy]:
    """The rank of every matrix, all explicit ranks checked.

    Args:
        matrices: by name.
        ratio, value, energy, rule, overrides: as in `factorize_modules`.
        weights: whether the factors will be the truncation of the present weights.

    Raises:
        ValueError: contradicting or illegal numbers, or a pattern that matches nothing.
    """
    if ratio is not None and (value is not None or energy is not None):
        other = ("value", value) if energy is None else ("energy", energy)
        raise ValueError(f"give a rank ratio or a rank {other[0]}, not both: ratio {ratio}, {other[0]} {other[1]}")
    if energy is not None:
        check_threshold(energy, "rank energy")
    explicit = explicit_ranks(matrices, overrides or {})
    ranks: dict[str, int | ByEnergy] = {}
    for name, m in matrices.items():
        if name not in explicit and energy is not None:
            cap = check_cap(value, m, name)
            known = weights and m.weight.device.type != "meta"
            ranks[name] = ByEnergy(energy, cap) if known else min(cap, lawful_rank(m.d_in, m.d_out, energy))
            continue
        rank = explicit.get(name, value)
        if rank is None:
            rank = rank_from_ratio(DEFAULT_RATIO if ratio is None else ratio, m.d_in, m.d_out, rule)
        check_rank(rank, m.d_in, m.d_out, name)
        ranks[name] = rank
    return ranks


def explicit_ranks(matrices: Mapping[str, Matrix], overrides: Mapping[str, int]) -> dict[str, int]:
    """The ranks that overrides name; the first pattern that matches a matrix decides."""
    all_names = {alias: name for name, m in matrices.items() for alias in m.names}
    explicit: dict[str, int] = {}
    for pattern, override in overrides.items():
        for alias in match_all(pattern, all_names, "override"):
            explicit.setdefault(all_names[alias], override)
    return explicit


def check_cap(value: int | None, matrix: Matrix, name: str) -> int:
    """The largest rank that an energy may choose; a cap above full rank caps nothing."""
    largest = min(matrix.d_in, matrix.d_out)
    if value is None or (isinstance(value, int) and value > largest):
        return largest
    check_rank(value, matrix.d_in, matrix.d_out, name)
    return value


@cache
def lawful_rank(d_in: int, d_out: int, energy: float) -> int:
    """The rank that keeps this energy of a Gaussian (d_out, d_in) matrix."""
    return energy_rank(gaussian_spectrum(d_in, d_out, min(d_in, d_out), 1.0), energy)
