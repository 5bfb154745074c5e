"""A race: arms on identical data, each at its own searched rates, with every seed, at every horizon.

At the first horizon an arm's search starts at its defaults, at a later one where it ended before. It depends on the arm
alone, so an arm that runs in several races, or cards, is the same cells, which run once.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nativerank.experiments.arms import LR, Arm, parse_arm
from nativerank.experiments.compare import Comparison, Runner
from nativerank.experiments.findings import at_multiple, norms, quantiles
from nativerank.experiments.search import parse_stages, tune
from nativerank.experiments.summary import arm_entry, cell_entries
from nativerank.reproduce.card import Race, Scale

STEPS = "train.steps"
SERIES_POINTS = 60
CAP = "optim.update_cap"
Result = dict[str, Any]


def run_race(race: Race, scale: Scale, grid: Path, runner: Runner, start: Callable[[Arm], Arm]) -> Result:
    """Runs what is missing; what every arm did, by horizon.

    Args:
        grid: folder of the cells. runner: runs them.
        start: gives an arm what it starts from, where that is not from scratch.
    """
    found: Result = {"budget": race.budget, "horizons": {}}
    arms = [start(parse_arm(text)) for text in race.arms]
    for steps in race.horizons or scale.horizons:
        common = {**scale.settings, **race.settings, STEPS: steps}
        comparison = Comparison(grid, common, race.budget, scale.seeds, runner=runner)
        labels = comparison.enter(arms)
        tune(comparison, labels, parse_stages(race.stages or scale.stages))
        run_multiples(comparison, race)
        found["horizons"][str(steps)] = horizon(comparison, race)
        arms = [moved(arm, comparison) for arm in arms]
    return found


def moved(arm: Arm, comparison: Comparison) -> Arm:
    """The arm, starting where its search ended."""
    return replace(arm, settings={**arm.settings, **comparison.anchors.get(arm.label, {})})


def run_multiples(comparison: Comparison, race: Race) -> None:
    """Every arm at multiples of its searched rate, and the capped ones."""
    labels, seeds = list(comparison.contenders), range(comparison.seeds)
    comparison.run([(k, at_multiple(comparison, k, m), s) for k in labels for m in race.multiples for s in seeds])
    for arm, other in race.capped.items():
        high = at_multiple(comparison, arm, max(race.multiples))
        cap = {**comparison.contenders[arm].arm.settings, **high, CAP: at_multiple(comparison, other, 1)[LR]}
        (label,) = comparison.enter([Arm(capped_label(arm), comparison.contenders[arm].arm.method, cap)])
        comparison.run_product([label], {})


def capped_label(arm: str) -> str:
    """What an arm is called whose steps of W are capped."""
    return f"{arm}, capped"


def horizon(comparison: Comparison, race: Race) -> Result:
    """Arms at their best, every cell that was tried, and what the probe saw at the multiples."""
    entries = {label: arm_entry(comparison, label) for label in comparison.contenders}
    found: Result = {
        "arms": {label: {**slim(entry), "tried": tried(comparison, label)} for label, entry in entries.items()}
    }
    if race.multiples:
        found["norms"] = {
            label: {f"{m:g}": at(comparison, label, m) for m in (race.multiples if label in race.arms else (1.0,))}
            for label in comparison.contenders
        }
    return found


KEPT = (
    *("method", "rank", "steps", "tokens", "flops", "flops_per_token", "parameters", "best", "seeds", "val_losses"),
    *("seconds", "peak_memory_bytes", "edges", "diverged", "failed", "refused", "refused_steps_at_best"),
)


def slim(entry: Result) -> Result:
    """What a card keeps of an arm."""
    return {key: entry[key] for key in KEPT}


def tried(comparison: Comparison, label: str) -> list[Result]:
    """Every cell of an arm: its point, its seed, its loss or why it has none."""
    dropped = ("method", "step", "seconds")
    return [{k: v for k, v in row.items() if k not in dropped} for row in cell_entries(comparison, label)]


def at(comparison: Comparison, label: str, multiple: float) -> Result:
    """Losses and probed norms of an arm at a multiple of its rate: quantiles by seed, and the first seed's course."""
    point = at_multiple(comparison, label, multiple)
    series = [norms(comparison, label, multiple, seed) for seed in range(comparison.seeds)]
    every = max(1, len(series[0]["steps"]) // SERIES_POINTS)
    return {
        "lr": point[LR],
        "lack": comparison.tries[label].lack(point),
        "val_losses": list(comparison.tries[label].losses(point).values()),
        "quantiles": [{k: quantiles(v) for k, v in one.items() if k != "steps"} for one in series if one["steps"]],
        "course": {key: values[::every] for key, values in series[0].items()},
    }
