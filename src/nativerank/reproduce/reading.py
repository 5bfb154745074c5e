"""What judges read of a result: arms by race and horizon, and paired differences between them."""

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nativerank.experiments.arms import LR
from nativerank.experiments.statistics import Interval, paired_difference
from nativerank.reproduce.store import Outcome

Entry = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """The outcome of a card at one scale.

    Args:
        outcome: as it was stored.
    """

    outcome: Outcome

    def horizons(self, race: str) -> list[int]:
        """Steps of a race, in order; none where it did not run."""
        return sorted(map(int, self.outcome.races.get(race, {}).get("horizons", ())))

    def arms(self, race: str, steps: int) -> dict[str, Entry]:
        """The arms of a race by label."""
        found: dict[str, Entry] = self.outcome.races[race]["horizons"][str(steps)]["arms"]
        return found

    def losses(self, race: str, steps: int, arm: str) -> dict[int, float]:
        """At the arm's best point, by seed."""
        entry = self.arms(race, steps)[arm]
        return dict(zip(entry["seeds"], entry["val_losses"], strict=True))

    def mean(self, race: str, steps: int, arm: str) -> float | None:
        """Over the seeds; None where no run finished."""
        losses = self.losses(race, steps, arm)
        return statistics.fmean(losses.values()) if losses else None

    def difference(self, race: str, steps: int, arm: str, other: str, others_race: str | None = None) -> Interval:
        """Loss of an arm minus that of another, paired by seed; NaN where they share no seed."""
        found = paired_difference(self.losses(race, steps, arm), self.losses(others_race or race, steps, other))
        return found or Interval(0, math.nan, None, None)

    def differences(
        self, race: str, arm: str, other: str, others_race: str | None = None, where: str = ""
    ) -> dict[str, Interval]:
        """The same at every horizon of both: "M, 600 steps" -> interval."""
        shared = [steps for steps in self.horizons(race) if steps in self.horizons(others_race or race)]
        return {
            f"{where}{steps:,} steps": self.difference(race, steps, arm, other, others_race)
            for steps in shared
            if arm in self.arms(race, steps) and other in self.arms(others_race or race, steps)
        }

    def best_rate(self, race: str, steps: int, arm: str) -> float | None:
        """The matrix rate that the search ended at."""
        best: Mapping[str, float] | None = self.arms(race, steps)[arm]["best"]
        return best[LR] if best else None

    def norms(self, race: str, steps: int, arm: str, multiple: float = 1.0) -> Entry | None:
        """What the probe saw at a multiple of the searched rate; None where it did not run."""
        found = self.outcome.races[race]["horizons"][str(steps)].get("norms", {}).get(arm, {})
        entry: Entry | None = found.get(f"{multiple:g}")
        return entry

    def median_norm(
        self, race: str, steps: int, arm: str, multiple: float, key: str = "update_norm", which: str = "median"
    ) -> float | None:
        """A quantile of a probed norm along the run, the mean over seeds; None where nothing was probed."""
        entry = self.norms(race, steps, arm, multiple)
        values = [one[key][which] for one in entry["quantiles"]] if entry else []
        return statistics.fmean(values) if values else None


def best_of(seen: Seen, race: str, steps: int, arms: list[str]) -> str | None:
    """The arm of lowest mean loss among those that finished."""
    means = {arm: mean for arm in arms if (mean := seen.mean(race, steps, arm)) is not None}
    return min(means, key=means.__getitem__) if means else None


def at_steps(points: Mapping[int, float], steps: float) -> float | None:
    """A loss between those of two horizons, linear in the logarithm of the steps; None outside of them."""
    known = sorted(points.items())
    for (low, above), (high, below) in itertools.pairwise(known):
        if low <= steps <= high:
            share = math.log(steps / low) / math.log(high / low)
            return above + share * (below - above)
    return None
