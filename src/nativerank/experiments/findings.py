"""What a study says beyond its table: lines for a reader, numbers for a program.

A loss increase is the validation loss at a multiple of an arm's tuned rate less that at the tuned rate, averaged over
the seeds that both have. The tuned rate is where the arm's search ended: what is tried later does not move it. A point
of which a run diverged, failed, was refused or never ran has no loss; its increase is None and it is told why.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nativerank.experiments.arms import LR
from nativerank.experiments.cell_log import last_rows
from nativerank.experiments.compare import Comparison
from nativerank.experiments.contender import Point
from nativerank.experiments.statistics import paired_difference
from nativerank.experiments.table import count
from nativerank.methods import find_method

Increases = dict[float, float | None]  # by multiple of the best rate
NORMS = ("update_norm", "output_change", "sigma_W")  # of a probed matrix


@dataclass
class Findings:
    """Lines for table.md, numbers for compare.json, series for a figure (label -> {steps, NORMS})."""

    lines: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    series: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def at_multiple(comparison: Comparison, label: str, multiple: float) -> Point:
    """An arm's tuned point with its matrix rate multiplied."""
    here = comparison.best(label) or comparison.contenders[label].start
    return {**here, LR: here[LR] if multiple == 1 else float(f"{here[LR] * multiple:.3g}")}


def mean_loss(comparison: Comparison, label: str, multiple: float = 1) -> float | None:
    """At the arm's tuned point or a multiple of its rate; None where that has no loss, see `lack`."""
    if lack(comparison, label, multiple):
        return None
    return statistics.fmean(comparison.tries[label].losses(at_multiple(comparison, label, multiple)).values())


def lack(comparison: Comparison, label: str, multiple: float = 1) -> str | None:
    """Why there is no loss: "diverged 2 of 3", "failed 1 of 3", "refused", "not run"; None where there is one."""
    return comparison.tries[label].lack(at_multiple(comparison, label, multiple))


def increase(comparison: Comparison, label: str, multiple: float) -> float | None:
    """Loss increase at a multiple of the arm's tuned rate; None where either has no loss."""
    if lack(comparison, label) or lack(comparison, label, multiple):
        return None
    tries = comparison.tries[label]
    here, there = (tries.losses(at_multiple(comparison, label, m)) for m in (1, multiple))
    difference = paired_difference(there, here)
    return difference.mean if difference else None


def signed(value: float | None, missing: str | None) -> str:
    """A difference of losses in words, or what stands in its place."""
    return missing or "no shared seed" if value is None else f"{value:+.3f}"


def with_refused(words: str, steps: int) -> str:
    """Words on a point, and how often the guard acted there."""
    return f"{words} ({count(steps, 'step')} refused)" if steps else words


def robustness(
    comparison: Comparison, labels: Sequence[str], multiples: Sequence[float], of: Sequence[str]
) -> Findings:
    """Loss increases of every arm, and the ratio of the others' to those of each arm in `of`."""
    rows = {label: {m: increase(comparison, label, m) for m in multiples} for label in labels}
    why = {label: {m: lack(comparison, label, m) or lack(comparison, label) for m in multiples} for label in labels}
    found = Findings(numbers={"loss_increase": {k: {f"{m:g}x": v for m, v in row.items()} for k, row in rows.items()}})
    found.numbers["without_loss"] = {k: {f"{m:g}x": w for m, w in row.items() if w} for k, row in why.items()}
    for label, row in rows.items():
        tries = comparison.tries[label]
        points = {m: at_multiple(comparison, label, m) for m in multiples}
        words = [
            f"{m:g}x {with_refused(signed(value, why[label][m]), tries.refused_steps(points[m]))}"
            for m, value in row.items()
        ]
        best = at_multiple(comparison, label, 1)[LR]
        found.lines.append(f"loss increase over the best rate {best:g} of {label}: {', '.join(words)}")
        found.lines += refusals(comparison, label, points) + below(comparison, label)
    found.numbers["ratio"] = {
        base: {label: ratios(rows[label], rows[base]) for label in labels if label not in of} for base in of
    }
    for base, others in found.numbers["ratio"].items():
        for label, found_here in others.items():
            words = [f"{ratio:.1f} at {m}" for m, ratio in found_here.items()]
            found.lines.append(f"loss increase of {label} divided by that of {base}: {', '.join(words) or 'none'}")
    return found


def refusals(comparison: Comparison, label: str, points: dict[float, Point]) -> list[str]:
    """A line on the multiples that training does not take, with its reason."""
    reasons = {m: comparison.contenders[label].refusal(point) for m, point in points.items()}
    refused = [m for m, reason in reasons.items() if reason]
    names = " and ".join(f"{m:g}x" for m in refused)
    return [f"{label} at {names} was refused: {reasons[refused[0]]}"] if refused else []


def below(comparison: Comparison, label: str) -> list[str]:
    """A line where another point that was tried with as many seeds ends below the tuned one."""
    tries, here = comparison.tries[label], comparison.best(label)
    best = tries.best()
    if here is None or best is None or best == here or lack(comparison, label):
        return []
    means = [statistics.fmean(tries.losses(point).values()) for point in (best, here)]
    changed = ", ".join(f"{key} {value:g}" for key, value in best.items() if value != here[key])
    if means[0] >= means[1]:
        return []
    return [f"{label} ends lower at {changed} than where its search stopped: {means[0]:.3f} against {means[1]:.3f}"]


def ratios(above: Increases, below: Increases) -> dict[str, float]:
    """Quotients of two arms' increases, where both finished and the divisor is an increase."""
    pairs = {m: (above[m], below[m]) for m in above}
    return {f"{m:g}x": a / b for m, (a, b) in pairs.items() if a is not None and b is not None and b > 0}


def transfer(comparison: Comparison, by_width: dict[str, dict[int, str]]) -> Findings:
    """The best rate of each method at each width; `by_width`: method -> width -> label."""
    found = Findings(numbers={"best_rate_by_width": {}})
    for method, labels in by_width.items():
        best = {width: comparison.tries[label].best() for width, label in labels.items()}
        rates = {width: point[LR] for width, point in best.items() if point}
        found.numbers["best_rate_by_width"][method] = rates
        words = ", ".join(f"{rate:g} at d_model {width}" for width, rate in rates.items())
        found.lines.append(f"best rate of {method}: {words or 'no run finished'}")
    return found


def norms(comparison: Comparison, label: str, multiple: float, seed: int = 0) -> dict[str, list[float]]:
    """steps and NORMS of the probed matrix along one seed's run; steps that the guard refused left out."""
    rows = last_rows(comparison.run_folder(label, at_multiple(comparison, label, multiple), seed))
    seen = [(row["step"], next(iter(row["probes"].values()))) for row in rows if row.get("probes")]
    seen = [(step, probe) for step, probe in seen if all(isinstance(probe.get(k), float) for k in NORMS)]
    seen = [(step, probe) for step, probe in seen if probe["update_norm"] > 0]
    return {"steps": [step for step, _ in seen], **{key: [probe[key] for _, probe in seen] for key in NORMS}}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th percentile and maximum."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"median": statistics.median(values), "p90": tenths[8], "max": max(values)}


def norm_findings(comparison: Comparison, wanted: Iterable[tuple[str, float]]) -> Findings:
    """||dW||, ||W|| and the change of the layer's output, per arm and multiple of its tuned rate."""
    found = Findings()
    for label, multiple in wanted:
        series = norms(comparison, label, multiple)
        name = f"{label} at {multiple:g}x" if multiple != 1 else label
        if not series["steps"]:
            found.lines.append(f"{name}: {lack(comparison, label, multiple) or 'nothing was probed'}")
            continue
        found.series[name] = series
        figures = {key: quantiles(series[key]) for key in NORMS}
        found.numbers[name] = figures
        words = "; ".join(f"{key} {q['median']:.3g} ({q['p90']:.3g}, {q['max']:.3g})" for key, q in figures.items())
        missing = lack(comparison, label, multiple)
        ended = f" ({missing})" if missing else ""
        found.lines.append(f"{name}{ended}, median (p90, max) over the run: {words}")
    return found


def best_of_kinds(comparison: Comparison) -> Findings:
    """The best low-rank arm less the best dense one."""
    means = {label: mean_loss(comparison, label) for label in comparison.contenders}
    left_out = [f"left out: {label}, {lack(comparison, label)}" for label, mean in means.items() if mean is None]
    kinds: dict[str, dict[str, float]] = {"low rank": {}, "dense": {}}
    for label, mean in means.items():
        dense = find_method(comparison.contenders[label].arm.method).layer is None
        if mean is not None:
            kinds["dense" if dense else "low rank"][label] = mean
    if not all(kinds.values()):
        return Findings([*left_out, "one side has no finished run, so there is nothing to compare"])
    low, dense_arm = (min(kinds[kind], key=kinds[kind].__getitem__) for kind in ("low rank", "dense"))
    losses = [comparison.tries[label].losses(at_multiple(comparison, label, 1)) for label in (low, dense_arm)]
    difference = paired_difference(*losses)
    assert difference is not None, "a tuned point without a lack has all seeds"
    interval = "" if difference.low is None else f", 95% interval [{difference.low:+.3f}, {difference.high:+.3f}]"
    line = (
        f"best low rank ({low}) minus best dense ({dense_arm}) at equal FLOPs: {difference.mean:+.3f} nats"
        f"{interval}, n = {difference.n}; the regime is under-trained, where more steps win"
    )
    numbers = {"low_rank": low, "dense": dense_arm, "difference": difference._asdict()}
    return Findings([line, *left_out], numbers)
