"""How many runs the races of cards still need and how long they take, before the first of them."""

import math
from collections.abc import Callable, Iterable

from nativerank.experiments.arms import COORDINATES
from nativerank.experiments.compare import Row
from nativerank.experiments.expect import seconds_for
from nativerank.experiments.grid import Cell
from nativerank.experiments.results import finished
from nativerank.experiments.table import count
from nativerank.reproduce.card import Experiments, Scale
from nativerank.reproduce.place import Place
from nativerank.reproduce.race import run_race


def expectation(wanted: Iterable[Experiments], scale: Scale, place: Place) -> str:
    """One line: runs that have no result yet, and their time; a search that has to walk needs more."""
    flops = rehearsed(wanted, scale, place)
    done = finished(place.folder)
    todo = [cost for name, cost in flops.items() if name not in done]
    if not todo:
        return f"{count(len(flops), 'run')} of races, all done"
    known = [(row["flops"], row["seconds"]) for row in done.values() if isinstance(row.get("flops"), float)]
    on_cpu = scale.settings.get("device", "cpu") == "cpu"
    seconds = seconds_for(todo, known, place.jobs, on_cpu)
    time = "time known after the first" if seconds is None else f"about {max(1, round(seconds / 60))} min"
    return f"{count(len(todo), 'run')} of races to go, {place.jobs} at a time: {time}; searches that walk take longer"


def rehearsed(wanted: Iterable[Experiments], scale: Scale, place: Place) -> dict[str, float]:
    """Name of every cell -> its training FLOPs, where every search ends at its start."""
    flops: dict[str, float] = {}
    races = (race for experiments in wanted for race in experiments.races.values())
    for race in races:
        if race.converted is None:  # where those start from is trained first
            run_race(race, scale, place.folder, imagining(flops), lambda arm: arm)
    return flops


def imagining(flops: dict[str, float]) -> Callable[..., list[Row]]:
    """A runner whose losses rise on both sides of the first point of an arm, which is where its search starts."""
    starts: dict[tuple[str, int], dict[str, float]] = {}

    def run(cells: list[Cell], about: Callable[[Cell], Row], name: Callable[[Cell], str]) -> list[Row]:
        rows = []
        for cell in cells:
            facts, settings = about(cell), dict(cell.settings)
            point = {key: settings[key] for key in COORDINATES if key in settings}
            start = starts.setdefault((facts["arm"], settings["train.steps"]), point)
            flops[cell.name] = facts["flops"]
            rows.append({"val_loss": sum(abs(math.log(point[key] / start[key])) for key in point)})
        return rows

    return run
