"""The best point of every arm: found by the same search, and flagged where it lies at an edge."""

import math

import pytest

from nativerank.experiments.arms import parse_arms, parse_values
from nativerank.experiments.compare import Comparison, Tries
from nativerank.experiments.request import TABLE
from nativerank.experiments.search import ALL_STAGES, parse_stages, search, tried_near
from nativerank.experiments.summary import edges


def entry(record, label):
    (found,) = [arm for arm in record["arms"] if arm["label"] == label]
    return found


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_a_best_rate_at_the_edge_is_flagged(ask, stand_in, side, tmp_path):
    values = "0.1,0.2,0.4" if side == "lower" else "0.025,0.05,0.1"
    record = ask("spectron", grid={"optim.lr": parse_values("--lrs", values)}, seeds=1)
    assert entry(record, "spectron")["edges"] == [{"coordinate": "optim.lr", "side": side}]
    assert f"best optim.lr at the {side} edge" in (tmp_path / "out" / TABLE).read_text()
    inside = ask("spectron", grid={"optim.lr": parse_values("--lrs", "0.05,0.1,0.2")}, seeds=1)
    assert entry(inside, "spectron")["edges"] == []


def test_a_diverged_value_was_tried_and_a_refused_one_was_not():
    tries = Tries()
    tries.add({"optim.lr": 0.5}, 0, {"val_loss": 3.0})
    tries.add({"optim.lr": 0.2}, 0, {"val_loss": 3.2})
    tries.add({"optim.lr": 2.0}, 0, {"error": "must be at most 1"})
    assert edges(tries, {"optim.lr": 0.5}) == [{"coordinate": "optim.lr", "side": "upper"}]
    tries.add({"optim.lr": 1.0}, 0, {"diverged": "the loss is not finite"})
    assert edges(tries, {"optim.lr": 0.5}) == []


def test_a_seed_that_did_not_finish_counts_against_its_point():
    tries = Tries()
    for lr, losses in {0.1: (3.2, 3.4), 0.2: (3.0, None)}.items():
        for seed, loss in enumerate(losses):
            tries.add({"optim.lr": lr}, seed, {"diverged": "x"} if loss is None else {"val_loss": loss})
    assert tries.best() == {"optim.lr": 0.1}
    assert Tries().best() is None


def test_tuning_treats_every_arm_alike_and_ends_inside(ask, stand_in):
    record = ask("spectron,dense-adamw", grid={}, stages=parse_stages(ALL_STAGES), seeds=3)
    for arm in record["arms"]:
        assert arm["edges"] == [] and arm["n"] == 3
        tried = {cell["optim.lr"] for cell in record["cells"] if cell["method"] == arm["label"]}
        assert min(tried) < arm["best"]["optim.lr"] < max(tried)
    spectron = entry(record, "spectron")["best"]
    # The formula's valley: lr (aux_lr)^0.3 is all that counts, and init_scale does not.
    assert abs(math.log(spectron["optim.lr"] / 0.1) + 0.3 * math.log(spectron["optim.aux_lr"] / 0.01)) < math.log(1.6)
    assert spectron["model.init_scale"] == 3**-0.5
    seeds = [cell["seed"] for cell in record["cells"] if cell["method"] == "spectron"]
    assert seeds.count(1) == seeds.count(2) == 1 and seeds.count(0) >= 7


def test_a_search_keeps_to_its_grid(ask, stand_in):
    """From 0.05 down to 0.0312 and back: 0.0499 is 0.05, which has run."""
    stand_in.loss = lambda s: 3 + 0.1 * abs(math.log(s["optim.lr"] / 0.0312)) + 0.01 * s["train.seed"]
    record = ask("spectron[optim.lr=0.05]", grid={}, stages=parse_stages("lr"), seeds=1)
    assert [c["optim.lr"] for c in stand_in.ran] == [0.05, 0.0312, 0.08, 0.0195]
    assert entry(record, "spectron[optim.lr=0.05]")["best"]["optim.lr"] == 0.0312
    assert tried_near(0.0499, [0.05, 0.0495, 0.08]) == 0.05 and tried_near(0.052, [0.05]) == 0.052


def test_a_coordinate_near_another_points_is_not_it(tmp_path, common, stand_in):
    """What was tried at another auxiliary rate does not stand for a value here."""
    comparison = Comparison(tmp_path, common(**{"optim__aux_lr": 0.01}), say=lambda line: None)
    labels = comparison.enter(parse_arms("spectron[optim.lr=0.05]"))
    other = {**comparison.contenders[labels[0]].start, "optim.lr": 0.0315, "optim.aux_lr": 0.5}
    comparison.run([(labels[0], other, 0)])
    search(comparison, labels, parse_stages("lr"))
    assert 0.0312 not in {c["optim.lr"] for c in stand_in.ran if c["optim.aux_lr"] == 0.01}, "it started from the best"
    assert {c["optim.lr"] for c in stand_in.ran if c["optim.aux_lr"] == 0.5} >= {0.0315, 0.0504}


def test_a_search_does_not_walk_along_a_plateau(ask, stand_in):
    """Down to 0.02 a step gains 0.1, below it a thousandth: where it starts on the plateau it stays."""
    stand_in.loss = lambda s: 3 + 0.001 * math.log(s["optim.lr"]) + 0.2 * max(0, math.log(s["optim.lr"] / 0.02))
    record = ask("spectron[optim.lr=0.01]", grid={}, stages=parse_stages("lr"), seeds=2)
    assert record["arms"][0]["best"]["optim.lr"] == 0.01 and len(stand_in.ran) == 4
    record = ask("spectron[optim.lr=0.05]", grid={}, stages=parse_stages("lr"), seeds=2)
    assert 0.0195 <= record["arms"][0]["best"]["optim.lr"] <= 0.02


def test_a_search_whose_points_all_diverge_stays(ask, stand_in):
    stand_in.loss = lambda s: float("inf")
    ask("spectron[optim.lr=0.05]", grid={}, stages=parse_stages("lr"), seeds=1)
    assert {c["optim.lr"] for c in stand_in.ran} == {0.05, 0.0312, 0.08}


def test_a_search_stops_at_a_refused_rate(ask, stand_in):
    stand_in.loss = lambda s: 3 - s["optim.lr"]
    record = ask("spectron[optim.lr=0.5]", grid={}, stages=parse_stages("lr"), seeds=1)
    (arm,) = record["arms"]
    assert max(c["optim.lr"] for c in stand_in.ran) == 0.8 == arm["best"]["optim.lr"]
    assert (arm["refused"], arm["failed"]) == (1, 0)
    assert arm["edges"] == [{"coordinate": "optim.lr", "side": "upper"}]
