"""Spectron, self-guided and naive AdamW on factors, at three sizes."""

from nativerank.experiments.statistics import Interval
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import UNTESTABLE, Verdict, below

SIZES = ("S", "M", "L")
SPECTRON, GUIDED, NAIVE = "spectron", "self-guided", "lowrank-adamw"


def judge(seen: Seen) -> dict[str, Verdict]:
    def against(arm: str, other: str, claimed: tuple[float, float] | None = None) -> Verdict:
        found: dict[str, Interval] = {}
        for size in SIZES:
            found |= seen.differences(size, arm, other, where=f"{size}, ")
        return below(found, claimed)

    return {
        "self-guided": against(SPECTRON, GUIDED, (0.06, 0.12)),
        "naive": against(SPECTRON, NAIVE, (0.06, 0.17)),
        "order": against(GUIDED, NAIVE),
        "downstream": Verdict(
            UNTESTABLE,
            "models of this size and length answer such tasks at chance; `nativerank eval RUN --tasks ...` is the way "
            "for larger ones",
        ),
    }
