"""Orthogonalisation and renormalisation, alone and together; and the rank ratio."""

import math

from nativerank.experiments.statistics import Interval
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict, below, told

BOTH = "spectron"
ORTHOGONAL = "spectron[optim.renormalize=false;optim.lr=0.026]"
RENORMAL = "spectron[optim.orthogonalizer=none;optim.lr=1]"
NEITHER = "spectron[optim.orthogonalizer=none;optim.renormalize=false;optim.lr=0.3]"
FULL, FAILS = 3.00, 1.0  # the published loss with both; nats behind it that are a failure
LOW, HIGH = "spectron[rank.ratio=0.125]", "spectron[rank.ratio=0.4]"


def judge(seen: Seen) -> dict[str, Verdict]:
    return {
        "orthogonalise": below(seen.differences("update", BOTH, RENORMAL), reduction(3.18)),
        "renormalise": below(seen.differences("update", BOTH, ORTHOGONAL), reduction(3.04)),
        "neither": neither(seen),
        "ratio": ratio(seen),
    }


def reduction(published: float) -> tuple[float, float]:
    """By which share both lower the perplexity of a published loss, and no upper end."""
    return 1 - math.exp(FULL - published), 1.0


def neither(seen: Seen) -> Verdict:
    """Whether momentum alone fails, which is more than ending a little higher."""
    found = below(seen.differences("update", BOTH, NEITHER))
    gaps = [d.mean for d in seen.differences("update", BOTH, NEITHER).values()]
    if found.word == REPRODUCED and max(gaps) > -FAILS:
        return Verdict(DIRECTION, f"{found.why}. It ends higher, and does not fail")
    return found


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
