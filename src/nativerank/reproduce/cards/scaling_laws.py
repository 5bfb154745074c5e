"""How the best size and the best number of tokens grow with compute, and what low rank saves at inference."""

import statistics
from pathlib import Path
from typing import Any

from nativerank.report.plots import canvas, legend, save
from nativerank.reproduce.figure import SHADES
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict

PAPER = {"spectron": (0.479, 0.521), "dense-muon": (0.49, 0.51)}
WIDE = 0.3  # an interval of an exponent that tells nothing


def judge(seen: Seen) -> dict[str, Verdict]:
    sweep = seen.outcome.sweeps["sweep"]
    groups = {group["method"]: group for group in sweep["groups"].values()}
    lack = lacking(sweep["runs"])
    found = {"exponents": exponents(groups), "saving": saving(sweep["saving"])}
    return {claim: Verdict(verdict.word, verdict.why + lack) for claim, verdict in found.items()}


def lacking(runs: list[dict[str, Any]]) -> str:
    """How many runs have no loss, so that nobody takes a hole for a minimum."""
    without = sum("val_loss" not in run for run in runs)
    return f"; {without} of {len(runs)} runs have no loss" if without else ""


def exponents(groups: dict[str, Any]) -> Verdict:
    """Whether the intervals hold the paper's exponents, and are narrow enough to say so."""
    words, holds, wide = [], [], False
    for method, (n, _) in PAPER.items():
        group = groups.get(method, {})
        iso = group.get("isoflop")
        if not iso or not iso["n_interval"]:
            reason = next(iter(group.get("warnings", [])), "it did not run")
            return Verdict(UNTESTABLE, f"no law through the minima of {method}: {reason}")
        low, high = iso["n_interval"]
        words.append(f"{method}: N ~ C^{iso['n_exponent']:.2f} ({low:.2f} to {high:.2f}), paper {n}")
        holds.append(low <= n <= high)
        wide = wide or high - low > WIDE
    why = "; ".join(words)
    if wide:
        return Verdict(UNTESTABLE, f"{why}. The intervals are too wide to tell")
    return Verdict(REPRODUCED if all(holds) else NOT, why)


def saving(found: dict[str, Any] | None) -> Verdict:
    """The share of parameters that the best low-rank model saves at the largest budget."""
    if not found or not found["interval"]:
        return Verdict(UNTESTABLE, "no saving can be told")
    low, high = found["interval"]
    why = (
        f"{found['at_budget']:.0%} ({low:.0%} to {high:.0%}) at {found['budget']:.3g} FLOPs; the published exponents "
        f"with equal prefactors give {found['at_last']:.0%} at 1e26, if the laws meet at the paper's smallest budget "
        f"{found['at_last_if_meeting_at_2.2e18']:.0%}"
    )
    if high - low > WIDE:
        return Verdict(UNTESTABLE, f"{why}. The interval is too wide to tell")
    return Verdict(REPRODUCED if low <= 0.5 <= high else DIRECTION if low > 0 else NOT, why)


def draw(seen: Seen, file: Path) -> Path:
    """Mean loss against parameters, a line per budget, a panel per method."""
    runs = seen.outcome.sweeps["sweep"]["runs"]
    methods, budgets = (sorted({run[key] for run in runs}) for key in ("method", "budget"))
    figure, panels = canvas(len(methods), 4.2 * len(methods), 3.8)
    for panel, method in zip(panels, methods, strict=True):
        for color, budget in zip(SHADES, budgets, strict=False):
            losses: dict[int, list[float]] = {}
            for run in runs:
                if (run["method"], run["budget"]) == (method, budget) and "val_loss" in run:
                    losses.setdefault(run["params"]["total"], []).append(run["val_loss"])
            points = sorted((size, statistics.fmean(values)) for size, values in losses.items())
            panel.plot(*zip(*points, strict=True), "o-", ms=4, color=color, label=f"{budget:.3g} FLOPs")
        panel.set(xscale="log", xlabel="parameters", ylabel="validation loss (nats/token)", title=method)
    legend(figure, panels[0])
    return save(figure, file)
