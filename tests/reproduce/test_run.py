"""What a card runs: searches, seeds, multiples, caps, conversions; cells are shared, and nothing runs twice."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from made import seen

from nativerank.experiments.arms import LR
from nativerank.reproduce.card import Race, Sweep
from nativerank.reproduce.cards import judge_of
from nativerank.reproduce.carry_out import carry_out, race_of
from nativerank.reproduce.expect import expectation, rehearsed
from nativerank.reproduce.place import OutOfTime, Place
from nativerank.reproduce.race import capped_label
from nativerank.reproduce.sweep import run_sweep
from nativerank.reproduce.together import merged, run_together
from nativerank.reproduce.verdict import UNTESTABLE

ARMS = ["spectron", "lowrank-adamw"]


def best(found, steps, arm):
    return found["horizons"][str(steps)]["arms"][arm]["best"][LR]


def test_every_arm_is_searched_at_every_horizon_and_runs_all_seeds(stand_in, scale, place):
    found = race_of(Race(arms=ARMS), scale, place)
    assert list(found["horizons"]) == ["4", "8"]
    for steps in (4, 8):
        for arm, optimum in (("spectron", 0.1), ("lowrank-adamw", 0.003)):
            entry = found["horizons"][str(steps)]["arms"][arm]
            assert optimum / 1.6 < entry["best"][LR] < optimum * 1.6
            assert entry["seeds"] == [0, 1, 2] and len(entry["val_losses"]) == 3 and entry["steps"] == steps
            assert not any(edge["coordinate"] == LR for edge in entry["edges"])


def test_the_second_horizon_starts_where_the_first_ended(stand_in, scale, place):
    found = race_of(Race(arms=["spectron"]), scale, place)
    later = [cell for cell in stand_in.ran if cell["train.steps"] == 8 and cell["train.seed"] == 0]
    assert best(found, 4, "spectron") in {cell["optim.lr"] for cell in later} and len(later) == 3


def test_arms_that_several_races_share_run_once(stand_in, scale, place):
    first = race_of(Race(arms=ARMS), scale, place)
    before = len(stand_in.ran)
    assert (
        race_of(Race(arms=["spectron"]), scale, place)["horizons"]["8"]["arms"]["spectron"]
        == (first["horizons"]["8"]["arms"]["spectron"])
    )
    assert len(stand_in.ran) == before


def test_races_together_leave_the_cards_nothing_to_search(stand_in, write_card, scale, place):
    one = write_card("ablation", [], races={"a": {"arms": ["spectron"]}, "b": {"arms": ["lowrank-adamw"]}})
    two = write_card("tsvd", [], races={"a": {"arms": ["spectron", "sct"], "multiples": [1, 4]}})
    run_together([card.scales["pocket"] for card in (one, two)], scale, place)
    before = len(stand_in.ran)
    for race in one.scales["pocket"].races.values():
        race_of(race, scale, place)
    assert len(stand_in.ran) == before
    race_of(two.scales["pocket"].races["a"], scale, place)
    assert {round(cell["optim.lr"] / 0.1) for cell in stand_in.ran[before:] if cell["method"] == "spectron"} <= {
        3,
        4,
        5,
    }


def test_what_is_expected_is_what_a_search_runs_that_ends_where_it_starts(stand_in, write_card, scale, place):
    card = write_card("ablation", [], races={"a": {"arms": ARMS, "multiples": [1, 4]}}).scales["pocket"]
    expected = rehearsed([card], scale, place)
    starts = {}

    def away(cell):
        start = starts.setdefault((cell["method"], cell["train.steps"]), cell["optim.lr"])
        return 3.0 + abs(math.log(cell["optim.lr"] / start)) + 0.01 * cell["train.seed"]

    stand_in.loss = away
    assert expectation([card], scale, place).startswith(f"{len(expected)} runs of races to go, 1 at a time: about ")
    race_of(card.races["a"], scale, place)
    assert len(stand_in.ran) == len(expected) == 2 * 2 * (3 + 2 + 3)  # arms, horizons, search and seeds and multiple
    assert expectation([card], scale, place) == f"{len(expected)} runs of races, all done"


def test_only_races_that_differ_in_nothing_but_arms_merge():
    plain, flops = Race(arms=["spectron"]), Race(arms=["spectron", "dense-adamw"], budget="flops")
    other = Race(arms=["dense-adamw", "spectron"], budget="flops")
    wide, converted = Race(arms=["sct"], settings={"train.context": 8}), Race(arms=["sct"], converted="dense-adamw")
    found = list(merged([plain, Race(arms=["sct", "spectron"], multiples=[4.0]), flops, other, wide, converted]))
    assert [race.arms for race in found] == [["spectron", "sct"], flops.arms, other.arms, wide.arms]
    assert not any(race.multiples for race in found)


def test_multiples_and_caps(stand_in, scale, place):
    stand_in.rows = lambda settings: [
        {"step": step, "loss": 3.0, "probes": {"m": {"update_norm": 0.1 * step, "output_change": 1.0, "sigma_W": 2.0}}}
        for step in (1, 2, 3)
    ]
    race = Race(arms=ARMS, multiples=[1.0, 8.0], capped={"lowrank-adamw": "spectron"})
    found = race_of(race, scale, place)["horizons"]["8"]
    rate = found["arms"]["lowrank-adamw"]["best"][LR]
    high = found["norms"]["lowrank-adamw"]["8"]
    assert high["lr"] == pytest.approx(8 * rate, rel=0.01) and len(high["val_losses"]) == 3
    assert [q["update_norm"]["max"] for q in high["quantiles"]] == pytest.approx([0.3] * 3)
    assert high["course"]["steps"] == [1, 2, 3]
    (cap,) = {
        cell["optim.update_cap"] for cell in stand_in.ran if cell["train.steps"] == 8 and "optim.update_cap" in cell
    }
    assert cap == found["arms"]["spectron"]["best"][LR]
    assert found["norms"][capped_label("lowrank-adamw")]["1"]["lr"] == high["lr"]


def test_arms_start_from_the_dense_arms_trained_model(stand_in, scale, place, monkeypatch):
    asked = []

    def convert(argv):
        asked.append(argv)
        Path(argv[argv.index("--out") + 1]).mkdir(parents=True)
        return ""

    monkeypatch.setattr("nativerank.reproduce.carry_out.command", convert)
    monkeypatch.setattr("nativerank.reproduce.carry_out.run_race", lambda race, *rest: asked.append((race, rest)) or {})
    monkeypatch.setattr("nativerank.reproduce.carry_out.trained_model", lambda *_: Path("run"))
    race_of(Race(arms=["sct[rank.value=4]"], converted="dense-adamw"), scale, place)
    race, rest = asked[0]
    start = rest[-1]
    from nativerank.experiments.arms import parse_arm

    arm = start(parse_arm(race.arms[0]))
    assert asked[1][:2] == ["convert", "run"] and "spectral" in asked[1] and "4" in asked[1]
    assert "rank.value" not in arm.settings and Path(arm.settings["init"]).is_dir()
    start(parse_arm(race.arms[0]))
    assert len(asked) == 2  # converted once


def test_a_run_that_has_no_time_left_is_saved_and_goes_on(stand_in, scale, tmp_path):
    with pytest.raises(OutOfTime):
        race_of(Race(arms=ARMS), scale, Place(tmp_path / "grid", 1, time.monotonic() - 1, lambda line: None))
    late = Place(tmp_path / "grid", 1, time.monotonic() + 600, lambda line: None)
    assert race_of(Race(arms=["spectron"]), replace(scale, horizons=[4]), late)["horizons"]


def test_measures_are_asked_once(place, monkeypatch):
    asked = []

    def answer(argv):
        asked.append(argv)
        return json.dumps({"x": 1})

    monkeypatch.setattr("nativerank.reproduce.place.command", answer)
    assert place.measure("bench bound --no_train") == place.measure("bench bound --no_train") == {"x": 1}
    assert asked == [["bench", "bound", "--no_train", "--json"]]


def test_a_measure_that_fails_says_why(place):
    with pytest.raises(ValueError, match="unknown preset 'nothing'"):
        place.measure("plan --model.preset nothing")


def test_an_outcome_holds_command_program_and_experiments(stand_in, write_card, scale, place):
    card = write_card("ours", [], races={"tokens": {"arms": ["spectron"]}})
    found = carry_out(card, "pocket", scale, place, "nativerank reproduce ours")
    assert found.command == "nativerank reproduce ours" and found.commit and not found.stale(card, "pocket", scale)
    assert found.races["tokens"]["horizons"]["8"]["arms"]["spectron"]["val_losses"]
    assert str(place.folder) not in json.dumps(found.races)


SIZES = {"pocket@32x1x2": -1, "pocket@48x2x3": 0, "pocket@64x2x4": 1}


@pytest.fixture
def sweep(scale, place):
    """sweep(): what a sweep of SIZES gives, dense and in low rank."""
    arms = ["dense-muon", "spectron[rank.ratio=0.25]"]
    settings = {"data.path": scale.settings["data.path"], "train.probe": ["*.1.self_attn.o_proj"]}
    wanted = Sweep(sizes=list(SIZES), budgets=[4e9, 8e9, 1.6e10], arms=arms)
    return lambda: run_sweep(wanted, replace(scale, settings=settings), place)


def test_a_sweep_is_run_and_fitted(stand_in, sweep):
    stand_in.loss = lambda cell: 3.0 + 0.1 * SIZES[cell["model.preset"]] ** 2 + 0.001 * cell["train.seed"]
    found = sweep()
    assert len(found["runs"]) == 3 * 3 * 2 * 3 and {run["seed"] for run in found["runs"]} == {0, 1, 2}
    assert not any("train.probe" in cell for cell in stand_in.ran), "a model of one layer has no second one to probe"
    groups = {group["method"]: group for group in found["groups"].values()}
    assert groups.keys() == {"dense-muon", "spectron"}
    assert all(abs(group["isoflop"]["n_exponent"]) < 0.05 for group in groups.values())
    assert found["saving"]["interval"][0] <= found["saving"]["at_budget"] <= found["saving"]["interval"][1]


def test_a_sweep_without_minima_says_so(stand_in, sweep):
    stand_in.loss = lambda cell: 2.0 + 10 / cell["train.steps"] ** 0.5  # more steps, so the smallest model, are best
    found = sweep()
    assert found["groups"] == {} and found["saving"] is None and "minimum" in found["warnings"][-1]
    verdicts = judge_of("scaling-laws").judge(seen(sweeps={"sweep": found}))
    assert {verdict.word for verdict in verdicts.values()} == {UNTESTABLE}


def test_runs_of_a_sweep_that_failed_are_told(stand_in, sweep):
    def loss(cell):
        smallest = cell["model.preset"] == "pocket@32x1x2"
        return (1, "no memory") if smallest else 3.0 + 0.1 * SIZES[cell["model.preset"]] ** 2

    stand_in.loss = loss
    found = sweep()
    assert sum("error" in run for run in found["runs"]) == 3 * 2 * 3
    verdicts = judge_of("scaling-laws").judge(seen(sweeps={"sweep": found}))
    assert all(verdict.why.endswith("18 of 54 runs have no loss") for verdict in verdicts.values())
