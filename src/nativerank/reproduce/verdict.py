"""Verdicts, and how they follow from paired differences; what a card says is never written by hand.

    reproduced        resolved in the claimed direction at every horizon, and of the claimed size where one is claimed
    in direction      resolved at one horizon at least, nowhere against, but not everywhere, or smaller than claimed
    not reproduced    not resolved anywhere, or resolved against the claim
    not testable here

A difference is resolved where its 95% interval (paired by seed) leaves out zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nativerank.experiments.statistics import Interval

REPRODUCED, DIRECTION, NOT, UNTESTABLE = "reproduced", "in direction", "not reproduced", "not testable here"


@dataclass(frozen=True)
class Verdict:
    """A word of the four, and why in a sentence or two."""

    word: str
    why: str

    def __post_init__(self) -> None:
        assert self.word in (REPRODUCED, DIRECTION, NOT, UNTESTABLE), self.word


Band = tuple[float, float]


def below(differences: Mapping[str, Interval], claimed: Band | None = None) -> Verdict:
    """Whether an arm ends below another.

    Args:
        differences: where (a horizon, a size) -> its loss minus the other's, in nats.
        claimed: the least and largest reduction of perplexity that was published, as shares.
    """
    why = "; ".join(f"{where}: {told(found)}" for where, found in differences.items())
    found = list(differences.values())
    if not found or any(d.low is None for d in found):
        return Verdict(UNTESTABLE, why or "no run finished")
    if any(d.low > 0 for d in found if d.low is not None) or not any(is_below(d) for d in found):
        return Verdict(NOT, why)
    large = claimed is None or all(overlaps(d, claimed) for d in found)
    return Verdict(REPRODUCED if large and all(map(is_below, found)) else DIRECTION, why)


def not_above(differences: Mapping[str, Interval], slack: float) -> Verdict:
    """Whether an arm is as good as another: nowhere worse by more than `slack` nats, with 95% confidence.

    In direction where the means are, and the intervals leave it open.
    """
    why = "; ".join(f"{where}: {told(found)}" for where, found in differences.items())
    found = list(differences.values())
    if not found or any(d.high is None for d in found):
        return Verdict(UNTESTABLE, why or "no run finished")
    if all(d.high <= slack for d in found if d.high is not None):
        return Verdict(REPRODUCED, why)
    if any(d.low > 0 for d in found if d.low is not None):
        return Verdict(NOT, why)
    return Verdict(DIRECTION if all(d.mean <= slack for d in found) else NOT, why)


def is_below(d: Interval) -> bool:
    """Whether a difference is resolved below zero."""
    return d.high is not None and d.high < 0


def overlaps(d: Interval, claimed: Band) -> bool:
    """Whether a reduction of perplexity, with its interval, reaches the claimed range or more."""
    assert d.low is not None
    return 1 - math.exp(d.low) >= claimed[0]


def told(d: Interval) -> str:
    """A difference in words: nats with interval, and what that is in perplexity."""
    interval = "" if d.low is None else f" [{d.low:+.3f}, {d.high:+.3f}]"
    return f"{d.mean:+.3f} nats{interval}, perplexity {math.expm1(d.mean):+.1%}"


def worst(verdicts: Sequence[Verdict]) -> str:
    """The word of several parts of one claim that holds only if all do."""
    order = (NOT, UNTESTABLE, DIRECTION, REPRODUCED)
    return min((verdict.word for verdict in verdicts), key=order.index)
