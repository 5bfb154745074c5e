"""Spectron's bound: the change of W, of the activations and W itself, beside naive AdamW and Muon on factors."""

from pathlib import Path

from nativerank.reproduce.figure import draw_norms
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict

RACE, SPECTRON, MUON, NAIVE = "rates", "spectron", "lowrank-muon", "lowrank-adamw"
MULTIPLES = (1.0, 8.0)
CLAIMS = {"update": "update_norm", "activations": "output_change", "weights": "sigma_W"}


def judge(seen: Seen) -> dict[str, Verdict]:
    found = {claim: ordered(seen, key) for claim, key in CLAIMS.items()}
    return {**found, "bound": bound(seen)}


def ordered(seen: Seen, key: str) -> Verdict:
    """Whether the largest value along the run is least for Spectron and most for AdamW, and at which rates."""
    words, holds, below_naive = [], [], []
    for steps in seen.horizons(RACE):
        for m in MULTIPLES:
            most = [seen.median_norm(RACE, steps, arm, m, key, "max") for arm in (SPECTRON, MUON, NAIVE)]
            if None in most:
                continue
            spectron, muon, naive = (value for value in most if value is not None)
            holds.append(spectron < muon < naive)
            below_naive.append(spectron < naive)
            words.append(f"{steps:,} steps, {m:g}x: {spectron:.2g}, {muon:.2g}, {naive:.2g}")
    why = "largest along the run at multiples of the best rates (Spectron, Muon, AdamW): " + "; ".join(words)
    if not holds:
        return Verdict(UNTESTABLE, "nothing was probed")
    if all(holds):
        return Verdict(REPRODUCED, why)
    return Verdict(DIRECTION if all(below_naive) else NOT, why)


def bound(seen: Seen) -> Verdict:
    """The largest ||dW|| / eta that the probe saw."""
    ratios = {}
    for steps in seen.horizons(RACE):
        for m in MULTIPLES:
            entry, most = seen.norms(RACE, steps, SPECTRON, m), seen.median_norm(RACE, steps, SPECTRON, m, which="max")
            if entry and most:
                ratios[f"{steps:,} steps, {m:g}x"] = most / entry["lr"]
    why = "largest norm of dW over eta, mean of the seeds: " + ", ".join(f"{k}: {v:.2f}" for k, v in ratios.items())
    if not ratios:
        return Verdict(UNTESTABLE, "nothing was probed")
    return Verdict(REPRODUCED if max(ratios.values()) <= 1 else NOT, why)


def draw(seen: Seen, file: Path) -> Path:
    titles = {"update_norm": "||dW||", "output_change": "RMS change of the output", "sigma_W": "||W||"}
    return draw_norms(seen, RACE, titles, file)
