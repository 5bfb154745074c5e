"""Races of several cards as one, before the cards run one by one and find their cells done.

A line search waits for its slowest arm, so the more arms search side by side the fewer cores are idle.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

from nativerank.reproduce.card import Experiments, Race, Scale
from nativerank.reproduce.place import Place
from nativerank.reproduce.race import run_race


def run_together(wanted: Iterable[Experiments], scale: Scale, place: Place) -> None:
    """Searches the arms of all races that start from scratch.

    Raises:
        OutOfTime: not every run has ended.
    """
    for race in merged(race for experiments in wanted for race in experiments.races.values()):
        run_race(race, scale, place.folder, place.run, lambda arm: arm)


def merged(races: Iterable[Race]) -> Iterator[Race]:
    """The races without multiples, those that differ in nothing but their arms as one."""
    found: dict[str, Race] = {}
    for race in races:
        if race.converted is not None:
            continue
        first = race.arms[:1] if race.budget == "flops" else []  # whose FLOPs all get
        key = json.dumps([race.settings, race.budget, race.horizons, race.stages, first], sort_keys=True)
        known = found.get(key, replace(race, arms=[], multiples=[], capped={}))
        found[key] = replace(known, arms=list(dict.fromkeys([*known.arms, *race.arms])))
    yield from found.values()
