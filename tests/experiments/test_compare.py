"""Comparisons: what is run, and what is said about it."""

import json
import math

import pytest

from nativerank.experiments.arms import parse_arms, parse_values
from nativerank.experiments.compare import Comparison
from nativerank.experiments.expect import expected_seconds, rehearse
from nativerank.experiments.request import RECORD, Request

LRS = {"optim.lr": parse_values("--lrs", "0.05,0.1,0.2")}


def test_the_best_point_by_mean_and_the_difference_to_the_first(ask, stand_in, tmp_path):
    record = ask(
        "spectron,spectron[optim.momentum=0.9],dense-adamw", grid={"optim.lr": parse_values("--lrs", "0.1,0.2")}
    )
    assert len(stand_in.ran) == 3 * 2 * 2
    first, _, dense = record["arms"]
    assert first["best"]["optim.lr"] == 0.1 and first["n"] == 2
    assert first["mean"] == pytest.approx(3.005) and first["sd"] == pytest.approx(0.01 / math.sqrt(2))
    assert first["perplexity"] == pytest.approx(math.exp(3.005)) and first["difference"] is None
    away = 0.1 * math.log(0.1 / 0.004) ** 2
    assert dense["difference"]["mean"] == pytest.approx(away) and dense["difference"]["n"] == 2
    assert dense["difference"]["low"] == pytest.approx(away) == pytest.approx(dense["difference"]["high"])
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == json.loads(json.dumps(record))


def test_cells_of_all_arms_share_seed_length_and_data(ask, stand_in):
    ask(seeds=2)
    for key in ("train.seed", "train.steps", "data.path", "train.context"):
        by_method = [{c[key] for c in stand_in.ran if c["method"] == m} for m in ("spectron", "lowrank-adamw")]
        assert by_method[0] == by_method[1]
    assert {c["train.seed"] for c in stand_in.ran} == {0, 1}


def test_names_of_cells_depend_on_settings_alone(tmp_path, common):
    """The same arm entered beside others, in another order and by another folder, is the same cell."""
    one, two = (Comparison(tmp_path / name, common()) for name in "ab")
    one.enter(parse_arms("spectron,dense-adamw[optim.eps=1e-9]"))
    two.enter(parse_arms("dense-adamw[optim.eps=1e-9],lowrank-muon,spectron"))
    point = {"optim.lr": 0.1, "optim.aux_lr": 0.01, "model.init_scale": 0.5}
    for label in one.contenders:
        cells = [comparison.contenders[label].cell(point, 1) for comparison in (one, two)]
        assert cells[0].name == cells[1].name
        assert cells[0].name != one.contenders[label].cell(point, 0).name
    assert (
        one.contenders["spectron"].cell(point, 0).name
        != one.contenders["dense-adamw[optim.eps=1e-9]"].cell(point, 0).name
    )


def test_equal_flops_give_the_cheaper_arm_more_steps(ask, stand_in):
    record = ask("spectron,dense-adamw", settings={"train__steps": 200}, budget="flops", seeds=1)
    low, dense = record["arms"]
    assert (
        low["steps"] == 200 and dense["steps"] == round(200 * low["flops_per_token"] / dense["flops_per_token"]) < 200
    )
    assert dense["flops"] == pytest.approx(low["flops"], rel=0.5 / dense["steps"])
    assert {c["method"]: c["train.steps"] for c in stand_in.ran} == {"spectron": 200, "dense-adamw": dense["steps"]}


def test_equal_tokens_are_equal_steps_and_a_guide_costs_flops(ask, stand_in):
    stand_in.loss = lambda settings: 3.0
    record = ask("spectron,self-guided,self-guided[guide.stochastic=false]", seeds=1)
    steps, flops = ([arm[key] for arm in record["arms"]] for key in ("steps", "flops"))
    assert len(set(steps)) == 1 and flops == sorted(flops) and len(set(flops)) == 3
    # The guide is gone at the end: the parameters are those of the factors.
    assert len({arm["parameters"]["total"] for arm in record["arms"]}) == 1


def test_what_training_refuses_is_refused_before_anything_runs(ask, stand_in, tmp_path):
    for methods, grid in (
        ("spectron[optim.lr=2]", {}),
        ("lowrank-adamw,spectron", {"optim.lr": parse_values("--lrs", "0.1,2")}),
        ("lowrank-adamw,spectron[optim.lr=0.5]", {"optim.lr": parse_values("--lrs", "1x,4x")}),
    ):
        with pytest.raises(ValueError, match=r"^spectron.*: spectron's optim\.lr is a bound .* at most 1 .* got 2"):
            ask(methods, grid=grid)
    for settings, said in (
        ({"train__context": 4096}, "train.context 4096 exceeds"),
        ({"train__probe": ["nothing"]}, "train.probe"),
    ):
        with pytest.raises(ValueError, match=said):
            ask("spectron", settings=settings)
    assert stand_in.ran == [] and not (tmp_path / "out").exists()
    # The certified form may take it, and AdamW too.
    ask("spectron[optim.certified=true],lowrank-adamw", grid={"optim.lr": parse_values("--lrs", "2")}, seeds=1)
    assert len(stand_in.ran) == 2


def test_guided_arms_may_have_no_guided_step(ask, stand_in):
    stand_in.loss = lambda settings: 3.0
    ask("self-guided[guide.share=0]", seeds=1)
    assert len(stand_in.ran) == 3


def test_the_rehearsal_names_the_cells_of_a_product(tmp_path, common):
    request = Request(tmp_path / "out", common(), parse_arms("spectron,dense-adamw"), LRS, seeds=2)
    comparison = Comparison(request.folder, request.common, seeds=2, jobs=2)
    cells = rehearse(request.run, comparison)
    assert len(cells) == 12 and not comparison.contenders and not request.folder.exists()
    assert expected_seconds(cells, request.folder, 2) == pytest.approx(12 * 8 / 2, rel=0.1), "tiny: overhead alone"


def test_expected_time_follows_what_ran(ask, stand_in, tmp_path, common):
    ask(seeds=1)
    request = Request(tmp_path / "out", common(optim__aux_lr=0.01), parse_arms("spectron,lowrank-adamw"), LRS, seeds=2)
    cells = rehearse(request.run, Comparison(request.folder, request.common, seeds=2))
    assert expected_seconds(cells, request.folder, 1) == pytest.approx(6 * (2.0 + 4.0)), "six are done, 2 s a run"


@pytest.mark.parametrize(
    ("methods", "changes", "said"),
    [
        ("dense-adamw[rank.value=4]", {}, r"dense-adamw\[rank.value=4\]: dense-adamw keeps dense matrices"),
        ("spectron,spectron[train.steps=3]", {"budget": "flops"}, "sets train.steps, which --budget flops decides"),
        ("spectron[optim.lr=0.1]", {}, "sets optim.lr itself, so its values must be multiples"),
    ],
)
def test_arms_that_cannot_be_leave_nothing_behind(ask, stand_in, tmp_path, methods, changes, said):
    with pytest.raises(ValueError, match=said):
        ask(methods, **changes)
    assert stand_in.ran == [] and not (tmp_path / "out").exists()


def test_an_arm_with_its_own_rate_takes_multiples_of_it(ask, stand_in):
    ask("spectron[optim.lr=0.3]", grid={"optim.lr": parse_values("--lrs", "0.5x,1x")}, seeds=1)
    assert [c["optim.lr"] for c in stand_in.ran] == [0.15, 0.3]
