"""Naive low-rank training: how far a step moves W, and whether that is what hurts."""

import statistics
from pathlib import Path

from nativerank.reproduce.figure import draw_norms
from nativerank.reproduce.race import capped_label
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict

RACE, NAIVE, DENSE = "rates", "lowrank-adamw", "dense-adamw"
MULTIPLES = (1.0, 8.0)
CLAIMED = (10.0, 30.0)
LARGER = 2.0  # a ratio that is one in direction, at every horizon


def judge(seen: Seen) -> dict[str, Verdict]:
    return {"blow-up": blow_up(seen), "cause": cause(seen)}


def blow_up(seen: Seen) -> Verdict:
    """||dW|| of naive AdamW over that of dense AdamW, each at the same multiple of its own best rate."""
    found = {(which, m): ratios(seen, m, which) for which in ("median", "max") for m in MULTIPLES}
    if not found["median", 1.0]:
        return Verdict(UNTESTABLE, "nothing was probed")
    names = {"median": "median", "max": "largest"}
    words = [f"{names[k]}, {m:g}x: {', '.join(f'{r:.2g}' for r in v)}" for (k, m), v in found.items() if v]
    why = "norm of dW along the run, naive over dense AdamW, at multiples of each one's best rate, by horizon: "
    why += "; ".join(words)
    if min(found["median", 1.0]) >= CLAIMED[0]:
        return Verdict(REPRODUCED, why)
    larger = any(values and min(values) >= LARGER for values in found.values())
    return Verdict(DIRECTION if larger else NOT, why)


def ratios(seen: Seen, multiple: float, which: str) -> list[float]:
    """Naive over dense, by horizon."""
    norms = [
        [seen.median_norm(RACE, steps, arm, multiple, which=which) for arm in (NAIVE, DENSE)]
        for steps in seen.horizons(RACE)
    ]
    return [naive / dense for naive, dense in norms if naive and dense]


def cause(seen: Seen) -> Verdict:
    """What capping ||dW|| at Spectron's eta gives back of the loss at eight times the best rate."""
    words, shares = [], []
    for steps in seen.horizons(RACE):
        means = [mean_at(seen, steps, NAIVE, 1.0), mean_at(seen, steps, NAIVE, 8.0)]
        means.append(mean_at(seen, steps, capped_label(NAIVE), 1.0))
        best, high, capped = means
        if best is None or high is None or capped is None:
            words.append(f"{steps:,} steps: not every run has a loss")
            continue
        words.append(f"{steps:,} steps: {best:.3f} at the best rate, {high:.3f} at 8x, {capped:.3f} at 8x capped")
        if high > best:
            shares.append((high - capped) / (high - best))
    why = "; ".join(words)
    if not shares:
        return Verdict(UNTESTABLE, why)
    why += f". The cap takes back {', '.join(f'{share:.0%}' for share in shares)} of what the rate cost"
    least = min(shares)
    return Verdict(REPRODUCED if least >= 0.8 else DIRECTION if least >= 0.3 else NOT, why)


def mean_at(seen: Seen, steps: int, arm: str, multiple: float) -> float | None:
    """Mean loss at a multiple of the best rate; None where a seed has none."""
    entry = seen.norms(RACE, steps, arm, multiple)
    return statistics.fmean(entry["val_losses"]) if entry and not entry["lack"] else None


def draw(seen: Seen, file: Path) -> Path:
    return draw_norms(seen, RACE, {"update_norm": "||dW||", "sigma_W": "||W||"}, file)
