"""How thin: from a ratio or an explicit number to the rank of one matrix.

    break-even   r* = d_in d_out / (d_in + d_out)     the factors r (d_in + d_out) are smaller than W only below it
    ratio rho    r = int(rho d_in); where that is not below r*, int(rho min(d_in, d_out))
    rule "code"  r = int(rho d_in) clipped to min(d_in, d_out), as the released Spectron code has it
    energy tau   the smallest r that keeps a share tau of ||W||_F^2 (`nativerank.linalg.energy`)

A ratio or an energy always gives a legal rank, between 1 and min(d_in, d_out); where even that saves nothing the
report warns.
Only an explicit rank can be an error.
"""

import math

DEFAULT_RATIO = 0.25
RULES = ("auto", "code")


def break_even_rank(d_in: int, d_out: int) -> float:
    """The rank at which r (d_in + d_out) parameters equal the d_in d_out of the dense matrix."""
    return d_in * d_out / (d_in + d_out)


def check_ratio(ratio: float) -> None:
    """Raises a ValueError unless the ratio is a positive finite number."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"rank ratio must be a positive number, got {ratio!r}")


def check_rank(rank: int, d_in: int, d_out: int, name: str) -> None:
    """Raises a ValueError naming the module unless 1 <= rank <= min(d_in, d_out)."""
    largest = min(d_in, d_out)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(
            f"rank of {name} must be an integer in [1, {largest}] (d_in {d_in}, d_out {d_out}), got {rank!r}"
        )


def rank_from_ratio(ratio: float, d_in: int, d_out: int, rule: str = "auto") -> int:
    """The rank a ratio means for a (d_out, d_in) matrix, always in [1, min(d_in, d_out)].

    By rule "auto" int(ratio * d_in), or int(ratio * min(d_in, d_out)) where that reaches break-even; by rule "code" the
    first, clipped. A ratio or a rule out of range is a ValueError.
    """
    check_ratio(ratio)
    if rule not in RULES:
        raise ValueError(f"unknown rank rule {rule!r}; known: {', '.join(RULES)}")
    rank = int(ratio * d_in)
    if rule == "auto" and rank >= break_even_rank(d_in, d_out):
        rank = int(ratio * min(d_in, d_out))
    return max(1, min(rank, d_in, d_out))


def rank_warning(rank: int, d_in: int, d_out: int) -> str | None:
    """What the report says when the factors are not smaller than the matrix, else None."""
    if rank < break_even_rank(d_in, d_out):
        return None
    return f"rank {rank} saves nothing: break-even is {break_even_rank(d_in, d_out):.1f}"
