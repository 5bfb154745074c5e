"""Runs what a card lacks at a scale.

OUT / SCALE-CODE / results.jsonl, cells/   the grid that all cards of a scale share; CODE is the hash of the program,
                                          so that no result of another program is taken for one of this
                 / converted/              dense models as factors
                 / measures/               what commands answered
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nativerank.experiments.arms import Arm, parse_arm
from nativerank.experiments.compare import Comparison
from nativerank.methods import find_method
from nativerank.reproduce.card import Card, Race, Scale
from nativerank.reproduce.code_hash import code_hash
from nativerank.reproduce.place import Place, command
from nativerank.reproduce.race import STEPS, run_race
from nativerank.reproduce.store import Outcome, config_hash
from nativerank.reproduce.sweep import run_sweep

RANK = "rank.value"


def carry_out(card: Card, name: str, scale: Scale, place: Place, asked: str) -> Outcome:
    """Everything that a card runs at a scale.

    Args:
        name: of the scale. place: where it runs. asked: the command that asks for it.

    Raises:
        OutOfTime: not all of it has ended.
        ValueError: an arm or a command that cannot be.
    """
    from nativerank.bench.record import environment
    from nativerank.train.setup import pick_device

    wanted = card.scales[name]
    measures = {key: place.measure(text) for key, text in wanted.measures.items()}
    races = {key: race_of(race, scale, place) for key, race in wanted.races.items()}
    sweeps = {key: run_sweep(sweep, scale, place) for key, sweep in wanted.sweeps.items()}
    about = environment(pick_device(scale.settings.get("device") or "cpu"))
    about.pop("load_average", None)
    hashes = config_hash(card, name, scale), code_hash(wanted)
    return Outcome(asked, about["commit"], *hashes, about, races, measures, sweeps)


def race_of(race: Race, scale: Scale, place: Place) -> dict[str, Any]:
    """One race, from scratch or from a converted model."""
    if race.converted is None:
        return run_race(race, scale, place.folder, place.run, lambda arm: arm)
    # The converted model brings its architecture along; of a preset the training settings count.
    settings = {k: v for k, v in scale.settings.items() if not k.startswith("model.") or k == "model.preset"}
    start = converter(race.converted, scale, place)
    return run_race(race, replace(scale, settings=settings), place.folder, place.run, start)


def converter(dense: str, scale: Scale, place: Place) -> Callable[[Arm], Arm]:
    """What makes an arm start from a dense arm's trained model, turned into factors of its rank."""
    trained = trained_model(parse_arm(dense), scale, place)

    def start(arm: Arm) -> Arm:
        settings = dict(arm.settings)
        rank, kind = settings.pop(RANK), find_method(arm.method).layer
        made = place.folder / "converted" / f"{dense}-{kind}-{rank}"
        if not made.exists():
            command(["convert", str(trained), "--rank.value", str(rank), "--kind", str(kind), "--out", str(made)])
        return replace(arm, settings={**settings, "init": str(made)})

    return start


def trained_model(dense: Arm, scale: Scale, place: Place) -> Path:
    """The run folder of a dense arm at its best at the last horizon, first seed: a cell of the races it runs in."""
    ran = run_race(Race(arms=[dense.label]), scale, place.folder, place.run, lambda arm: arm)
    steps = scale.horizons[-1]
    best = ran["horizons"][str(steps)]["arms"][dense.label]["best"]
    twin = Comparison(place.folder, {**scale.settings, STEPS: steps})
    twin.enter([dense])
    return twin.run_folder(dense.label, best, 0)
