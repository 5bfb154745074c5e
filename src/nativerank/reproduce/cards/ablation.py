"""Orthogonalisation and renormalisation, alone and together; and the rank ratio."""

from nativerank.experiments.statistics import Interval
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict, below, told

BOTH = "spectron"
ORTHOGONAL = "spectron[optim.renormalize=false;optim.lr=0.026]"
RENORMAL = "spectron[optim.orthogonalizer=none;optim.lr=1]"
NEITHER = "spectron[optim.orthogonalizer=none;optim.renormalize=false;optim.lr=0.3]"
LOW, HIGH = "spectron[rank.ratio=0.125]", "spectron[rank.ratio=0.4]"


def judge(seen: Seen) -> dict[str, Verdict]:
    return {
        "orthogonalise": below(seen.differences("update", BOTH, RENORMAL)),
        "renormalise": below(seen.differences("update", BOTH, ORTHOGONAL)),
        "neither": below(seen.differences("update", BOTH, NEITHER)),
        "ratio": ratio(seen),
    }


def ratio(seen: Seen) -> Verdict:
    """Whether 0.125 is far behind 0.25, and 0.4 hardly ahead of it."""
    low, high = (seen.differences("ratio", arm, BOTH) for arm in (LOW, HIGH))
    words = [
        f"{name}: {where}: {told(d)}" for name, group in (("0.125", low), ("0.4", high)) for where, d in group.items()
    ]
    why = "against 0.25: " + "; ".join(words)
    if not low or any(d.low is None for d in (*low.values(), *high.values())):
        return Verdict(UNTESTABLE, why)
    behind = [resolved_above(d) for d in low.values()]
    small_step = [abs(high[where].mean) < low[where].mean for where in low]
    if all(behind) and all(small_step):
        return Verdict(REPRODUCED, why)
    return Verdict(DIRECTION if any(behind) and any(small_step) else NOT, why)


def resolved_above(d: Interval) -> bool:
    """Whether a difference is resolved above zero."""
    return d.low is not None and d.low > 0
