"""One matrix rate for all sizes."""

from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict

SIZES, SPECTRON, NAIVE = ("S", "M", "L"), "spectron", "lowrank-adamw"
STEP = 1.65  # a step of the search's grid, with its rounding


def judge(seen: Seen) -> dict[str, Verdict]:
    spans, words = {}, []
    for arm in (SPECTRON, NAIVE):
        rates = {size: rate for size in SIZES if (rate := rate_of(seen, size, arm))}
        if len(rates) == len(SIZES):
            spans[arm] = max(rates.values()) / min(rates.values())
            words.append(f"{arm}: {', '.join(f'{size} {rate:.3g}' for size, rate in rates.items())}")
    steps = shared(seen)
    why = f"best rates at {steps:,} steps, searched in steps of 1.6: " + "; ".join(words) if steps else "did not run"
    if SPECTRON not in spans:
        return {"one-rate": Verdict(UNTESTABLE, why)}
    word = REPRODUCED if spans[SPECTRON] <= STEP else DIRECTION if spans[SPECTRON] <= STEP**2 else NOT
    return {"one-rate": Verdict(word, why)}


def shared(seen: Seen) -> int:
    """The first horizon, which every size runs."""
    return min((steps for size in SIZES for steps in seen.horizons(size)), default=0)


def rate_of(seen: Seen, size: str, arm: str) -> float | None:
    """The best rate of an arm at a size."""
    steps = shared(seen)
    return seen.best_rate(size, steps, arm) if steps in seen.horizons(size) else None
