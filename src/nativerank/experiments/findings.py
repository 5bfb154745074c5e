"""What a study says beyond its table: lines for a reader, numbers for a program.

A loss increase is the validation loss at a multiple of an arm's best rate less that at the best rate, averaged over the
seeds that both have. A run that diverged has no loss; its increase is None and is called "diverged".
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nativerank.experiments.arms import LR
from nativerank.experiments.compare import Comparison
from nativerank.experiments.contender import Point
from nativerank.experiments.statistics import paired_difference
from nativerank.experiments.summary import cell_rows
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
    """An arm's best point with its matrix rate multiplied."""
    best = comparison.tries[label].best() or comparison.contenders[label].start
    return {**best, LR: best[LR] if multiple == 1 else float(f"{best[LR] * multiple:.3g}")}


def mean_loss(comparison: Comparison, label: str) -> float | None:
    """At the arm's best point."""
    best = comparison.tries[label].best()
    return statistics.fmean(comparison.tries[label].losses(best).values()) if best else None


def increase(comparison: Comparison, label: str, multiple: float) -> float | None:
    """Loss increase at a multiple of the arm's best rate; None if no run there finished."""
    tries = comparison.tries[label]
    here, there = (tries.losses(at_multiple(comparison, label, m)) for m in (1, multiple))
    difference = paired_difference(there, here)
    return difference.mean if difference else None


def signed(value: float | None) -> str:
    """A difference of losses in words."""
    return "diverged" if value is None else f"{value:+.3f}"


def robustness(
    comparison: Comparison, labels: Sequence[str], multiples: Sequence[float], of: Sequence[str]
) -> Findings:
    """Loss increases of every arm, and the ratio of the others' to those of each arm in `of`."""
    rows = {label: {m: increase(comparison, label, m) for m in multiples} for label in labels}
    found = Findings(numbers={"loss_increase": {k: {f"{m:g}x": v for m, v in row.items()} for k, row in rows.items()}})
    for label, row in rows.items():
        best = at_multiple(comparison, label, 1)[LR]
        words = ", ".join(f"{m:g}x {signed(value)}" for m, value in row.items())
        found.lines.append(f"loss increase over the best rate {best:g} of {label}: {words}")
    found.numbers["ratio"] = {
        base: {label: ratios(rows[label], rows[base]) for label in labels if label not in of} for base in of
    }
    for base, others in found.numbers["ratio"].items():
        for label, found_here in others.items():
            words = ", ".join(f"{ratio:.1f} at {m}" for m, ratio in found_here.items())
            found.lines.append(f"loss increase of {label} divided by that of {base}: {words or 'none'}")
    return found


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


def norms(comparison: Comparison, label: str, multiple: float) -> dict[str, list[float]]:
    """steps and NORMS of the probed matrix along the first seed's run; steps that the guard refused left out."""
    rows = cell_rows(comparison, label, at_multiple(comparison, label, multiple), 0)
    seen = [(row["step"], next(iter(row["probes"].values()))) for row in rows if row.get("probes")]
    seen = [(step, probe) for step, probe in seen if all(isinstance(probe.get(k), float) for k in NORMS)]
    seen = [(step, probe) for step, probe in seen if probe["update_norm"] > 0]
    return {"steps": [step for step, _ in seen], **{key: [probe[key] for _, probe in seen] for key in NORMS}}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th percentile and maximum."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"median": statistics.median(values), "p90": tenths[8], "max": max(values)}


def norm_findings(comparison: Comparison, wanted: Iterable[tuple[str, float]]) -> Findings:
    """||dW||, ||W|| and the change of the layer's output, per arm and multiple of its best rate."""
    found = Findings()
    for label, multiple in wanted:
        series = norms(comparison, label, multiple)
        name = f"{label} at {multiple:g}x" if multiple != 1 else label
        if not series["steps"]:
            found.lines.append(f"{name}: nothing was probed")
            continue
        found.series[name] = series
        figures = {key: quantiles(series[key]) for key in NORMS}
        found.numbers[name] = figures
        words = "; ".join(f"{key} {q['median']:.3g} ({q['p90']:.3g}, {q['max']:.3g})" for key, q in figures.items())
        found.lines.append(f"{name}, median (p90, max) over the run: {words}")
    return found


def best_of_kinds(comparison: Comparison) -> Findings:
    """The best low-rank arm less the best dense one."""
    means = {label: mean_loss(comparison, label) for label in comparison.contenders}
    kinds: dict[str, dict[str, float]] = {"low rank": {}, "dense": {}}
    for label, mean in means.items():
        dense = find_method(comparison.contenders[label].arm.method).layer is None
        if mean is not None:
            kinds["dense" if dense else "low rank"][label] = mean
    if not all(kinds.values()):
        return Findings(["one side has no finished run, so there is nothing to compare"])
    low, dense_arm = (min(kinds[kind], key=kinds[kind].__getitem__) for kind in ("low rank", "dense"))
    losses = [comparison.tries[label].losses(comparison.tries[label].best() or {}) for label in (low, dense_arm)]
    difference = paired_difference(*losses)
    if difference is None:
        return Findings(["the best low-rank and the best dense arm share no finished seed"])
    interval = "" if difference.low is None else f", 95% interval [{difference.low:+.3f}, {difference.high:+.3f}]"
    line = (
        f"best low rank ({low}) minus best dense ({dense_arm}) at equal FLOPs: {difference.mean:+.3f} nats"
        f"{interval}, n = {difference.n}; the regime is under-trained, where more steps win"
    )
    numbers = {"low_rank": low, "dense": dense_arm, "difference": difference._asdict()}
    return Findings([line], numbers)
