"""Low rank against dense: at equal FLOPs, equal time and equal parameters."""

import statistics

from nativerank.experiments.statistics import Interval, paired_difference
from nativerank.reproduce.reading import Seen, at_steps
from nativerank.reproduce.verdict import UNTESTABLE, Verdict, below, not_above

DENSE = ("dense-adamw", "dense-muon")
SPECTRON = "spectron"
SLACK = 0.01  # nats that count as a match


def judge(seen: Seen) -> dict[str, Verdict]:
    return {
        "equal-flops": against_best(seen, "flops", "flops"),
        "equal-time": equal_time(seen),
        "equal-parameters": equal_parameters(seen),
    }


def best_dense(seen: Seen, race: str, steps: int) -> str | None:
    """The dense arm of lower mean loss."""
    means = {arm: mean for arm in DENSE if (mean := seen.mean(race, steps, arm)) is not None}
    return min(means, key=means.__getitem__) if means else None


def against_best(seen: Seen, race: str, dense_race: str) -> Verdict:
    """Spectron minus the better dense arm, by horizon of the low-rank one."""
    found = {}
    for steps in seen.horizons(race):
        dense = best_dense(seen, dense_race, steps)
        if dense:
            found[f"{steps:,} steps, against {dense}"] = seen.difference(race, steps, SPECTRON, dense, dense_race)
    return not_above(found, SLACK)


def equal_parameters(seen: Seen) -> Verdict:
    """Spectron minus the better dense arm of as many parameters, at equal tokens."""
    found = {}
    for steps in seen.horizons("parameters"):
        dense = best_dense(seen, "parameters", steps)
        if dense:
            counts = [
                seen.arms(race, steps)[arm]["parameters"]["total"]
                for race, arm in (("tokens", SPECTRON), ("parameters", dense))
            ]
            where = f"{steps:,} steps, {counts[0]:,} against {counts[1]:,} parameters ({dense})"
            found[where] = seen.difference("tokens", steps, SPECTRON, dense, "parameters")
    return below(found)


def step_ratio(seen: Seen, dense: str) -> float:
    """Time of a Spectron step over that of a dense one, by turns in one process."""
    ratio: dict[str, float] = seen.outcome.measures["steps"]["cases"][0]["seconds"]
    return ratio[SPECTRON] / ratio[dense]


def equal_time(seen: Seen) -> Verdict:
    """Spectron at its last horizon minus the dense arms at as much time, by seed; the longer side is cut."""
    found = {}
    for dense in DENSE:
        difference, words = at_equal_time(seen, dense)
        if difference:
            found[words] = difference
    if not found:
        return Verdict(UNTESTABLE, "no pair of runs covers the same time")
    return not_above(found, SLACK)


def at_equal_time(seen: Seen, dense: str) -> tuple[Interval | None, str]:
    """The paired difference, and what was compared; losses between horizons are interpolated in log steps."""
    ratio, last = step_ratio(seen, dense), seen.horizons("tokens")[-1]
    steps = {SPECTRON: float(last), dense: last * ratio}
    if ratio > 1:
        steps = {SPECTRON: last / ratio, dense: float(last)}
    losses = {arm: by_seed(seen, arm, count) for arm, count in steps.items()}
    words = (
        f"{steps[SPECTRON]:,.0f} steps against {steps[dense]:,.0f} of {dense}, a step taking {ratio:.2f} of the time"
    )
    return paired_difference(losses[SPECTRON], losses[dense]), words


def by_seed(seen: Seen, arm: str, steps: float) -> dict[int, float]:
    """Losses of an arm at a number of steps, from the horizons around it."""
    curves: dict[int, dict[int, float]] = {}
    for race in ("tokens", "flops"):
        for horizon in seen.horizons(race):
            entry = seen.arms(race, horizon).get(arm)
            if entry:
                for seed, loss in seen.losses(race, horizon, arm).items():
                    curves.setdefault(seed, {})[entry["steps"]] = loss
    found = {seed: at_steps(points, steps) for seed, points in curves.items()}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def tell(seen: Seen) -> list[str]:
    """Every low-rank arm beside the better dense one, at equal tokens."""
    lines = []
    for steps in seen.horizons("tokens"):
        dense = best_dense(seen, "tokens", steps)
        low = [arm for arm in seen.arms("tokens", steps) if arm not in DENSE]
        means = {arm: mean for arm in low if (mean := seen.mean("tokens", steps, arm)) is not None}
        if dense and means:
            best = min(means, key=means.__getitem__)
            gap = means[best] - statistics.fmean(seen.losses("tokens", steps, dense).values())
            lines.append(
                f"At equal tokens ({steps:,} steps) the best low-rank arm, {best}, is {gap:+.3f} nats from {dense}."
            )
    return lines
