"""TSVD, our reconstruction from its abstract: adaptive rank and strict orthonormality against dense."""

from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict, below, not_above

RACE, FIXED = "tokens", "tsvd"
ADAPTIVE = "tsvd[rank.adapt.threshold=0.97]"
DENSE, NAIVE = "dense-adamw", "lowrank-adamw"
SLACK = 0.01


def judge(seen: Seen) -> dict[str, Verdict]:
    matched = matches(seen)
    return {
        "matches-dense": matched,
        "less-compute": compute(seen, matched),
        "orthonormality": below(seen.differences(RACE, FIXED, NAIVE)),
    }


def matches(seen: Seen) -> Verdict:
    """Whether TSVD ends no higher than dense, with ranks that adapt and without."""
    arms = {"adaptive": ("adaptive", ADAPTIVE), "fixed": (RACE, FIXED)}
    found = {label: seen.differences(race, arm, DENSE) for label, (race, arm) in arms.items()}
    return not_above({f"{label}, {where}": d for label, by in found.items() for where, d in by.items()}, SLACK)


def compute(seen: Seen, matched: Verdict) -> Verdict:
    """Training FLOPs of a token, at the ranks of the start, beside dense; fewer for a higher loss save nothing."""
    ratios = [
        seen.arms(RACE, steps)[FIXED]["flops_per_token"] / seen.arms(RACE, steps)[DENSE]["flops_per_token"]
        for steps in seen.horizons(RACE)
    ]
    if not ratios:
        return Verdict(UNTESTABLE, "did not run")
    why = f"{ratios[-1]:.2f} of the dense model's training FLOPs per token, ranks falling only lowers it (exact count)"
    if matched.word in (NOT, UNTESTABLE):
        return Verdict(DIRECTION if ratios[-1] < 1 else NOT, why + "; without the loss of dense, see above")
    return Verdict(REPRODUCED if ratios[-1] < 0.75 else DIRECTION if ratios[-1] < 1 else NOT, why)
