"""TSVD, our reconstruction from its abstract: adaptive rank and strict orthonormality against dense."""

from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict, below, not_above

RACE, FIXED = "tokens", "tsvd"
ADAPTIVE = "tsvd[rank.adapt.threshold=0.97]"
DENSE, NAIVE = "dense-adamw", "lowrank-adamw"
SLACK = 0.01


def judge(seen: Seen) -> dict[str, Verdict]:
    return {
        "matches-dense": not_above(
            {
                f"{label}, {where}": d
                for label, race, arm in (("adaptive", "adaptive", ADAPTIVE), ("fixed", RACE, FIXED))
                for where, d in seen.differences(race, arm, DENSE).items()
            },
            SLACK,
        ),
        "less-compute": compute(seen),
        "orthonormality": below(seen.differences(RACE, FIXED, NAIVE)),
    }


def compute(seen: Seen) -> Verdict:
    """Training FLOPs of a token, at the ranks of the start, beside dense."""
    ratios = [
        seen.arms(RACE, steps)[FIXED]["flops_per_token"] / seen.arms(RACE, steps)[DENSE]["flops_per_token"]
        for steps in seen.horizons(RACE)
    ]
    if not ratios:
        return Verdict(UNTESTABLE, "did not run")
    why = f"{ratios[-1]:.2f} of the dense model's training FLOPs per token, ranks falling only lowers it (exact count)"
    return Verdict(REPRODUCED if ratios[-1] < 0.75 else DIRECTION if ratios[-1] < 1 else NOT, why)
