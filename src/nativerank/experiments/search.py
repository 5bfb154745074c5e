"""Line searches along one coordinate after the other, the same for every arm, dense ones included.

A line search tries both neighbours (value / factor, value * factor) of the best value until the best has both, so it
ends at a point without a neighbour better by LEAST_GAIN and never at the edge of what was tried. It runs one seed:
there, differences between neighbours below about 0.02 nats are noise, and on a plateau they would lead it anywhere. The
best points then run all seeds. Values are rounded to three digits, so the way back would miss a value by a little: one
that was tried NEAR the wanted one stands for it.
"""

from collections.abc import Sequence

from nativerank.experiments.arms import AUX_LR, INIT_SCALE, LR
from nativerank.experiments.compare import Comparison
from nativerank.experiments.contender import Point

Stage = tuple[str, float]  # coordinate, factor between neighbours
NEAR = 0.02  # of a value
LEAST_GAIN = 0.005  # nats for which a search moves on

STAGES: dict[str, Stage] = {"lr": (LR, 1.6), "aux_lr": (AUX_LR, 2.0), "init_scale": (INIT_SCALE, 2.0)}
ALL_STAGES = "lr,aux_lr,init_scale,lr"  # the matrix rate again, as the others move its optimum


def parse_stages(text: str) -> list[Stage]:
    """The stages of a comma list of coordinates.

    Raises:
        ValueError: an unknown one, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in STAGES:
            raise ValueError(f"--tune takes coordinates ({', '.join(STAGES)}), got {name!r}")
    if not names:
        raise ValueError("--tune names no coordinate")
    return [STAGES[name] for name in names]


def tune(comparison: Comparison, labels: Sequence[str], stages: Sequence[Stage]) -> None:
    """Searches, then runs all seeds at each arm's best point."""
    search(comparison, labels, stages)
    comparison.run_seeds(labels)


def search(comparison: Comparison, labels: Sequence[str], stages: Sequence[Stage]) -> None:
    """One seed, stage by stage, all arms at once, from the best points so far; where it ends is each arm's anchor."""
    best = {label: comparison.best(label) or comparison.contenders[label].start for label in labels}
    best = {label: dict(point) for label, point in best.items()}
    for key, factor in stages:
        line_search(comparison, {label: point for label, point in best.items() if key in point}, key, factor)
    comparison.anchors |= best


def tried_near(value: float, tried: Sequence[float]) -> float:
    """The value itself, or the nearest that was tried within NEAR of it."""
    nearest = min(tried, key=lambda other: abs(other - value), default=value)
    return nearest if abs(nearest - value) <= NEAR * value else value


def line_search(comparison: Comparison, best: dict[str, Point], key: str, factor: float) -> None:
    """Moves every arm's best point along one coordinate, in place."""

    def neighbours(label: str) -> list[Point]:
        here = best[label]
        values = (here[key], *(float(f"{value:.3g}") for value in (here[key] / factor, here[key] * factor)))
        tried = [p[key] for p in comparison.tries[label].points() if {**p, key: 0} == {**here, key: 0}]
        return [{**here, key: tried_near(value, tried)} for value in values]

    def loss(label: str, point: Point) -> float:
        return comparison.tries[label].losses(point).get(0, float("inf"))

    def missing() -> list[tuple[str, Point, int]]:
        every = ((label, point, 0) for label in best for point in neighbours(label))
        return [(label, point, 0) for label, point, _ in every if 0 not in comparison.tries[label].at(point)]

    while wanted := missing():
        comparison.run(wanted)
        for label, point in best.items():
            around = neighbours(label)
            losses = [loss(label, p) for p in around]
            if losses[0] - min(losses) > LEAST_GAIN:  # false of two infinities
                point[key] = around[losses.index(min(losses))][key]
