"""Runs in which ranks change: what they record, that they resume to the bit, and what is refused."""

import json
import math

import pytest
import torch

from nativerank.accounting.flops import flops_per_token
from nativerank.hub.load import load
from nativerank.layers.base import factor_layers
from nativerank.methods import METHODS
from nativerank.models import count_parameters
from nativerank.train.guard import Diverged
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows

LOW_RANK = [name for name, row in METHODS.items() if row.layer]
# Looks after steps 3, 6 and 9 of 12; checkpoints between and at them.
SHRINK = {
    "rank__value": 12,
    "rank__adapt__threshold": 0.8,
    "rank__adapt__start": 0.25,
    "rank__adapt__every": 0.25,
    "rank__adapt__min": 2,
    "rank__adapt__multiple": 1,
    "rank__adapt__hysteresis": 0.0,
    "train__steps": 12,
}
GROW = SHRINK | {"rank__value": 2, "rank__adapt__threshold": 0.999, "rank__adapt__grow": 0.5}


def changes(run):
    return [row for row in read_rows(run) if row.get("event") == "ranks"]


def ranks_of(model):
    return {name: layer.rank for name, layer in factor_layers(model).items()}


@pytest.mark.parametrize("method", ["spectron", "sct"])
def test_records_model_and_costs_follow(tmp_path, run_config, listen, method):
    summary = train(run_config(out=tmp_path / "a", method=method, **SHRINK), listen())
    events, rows = changes(tmp_path / "a"), [r for r in read_rows(tmp_path / "a") if "loss" in r]
    assert len(events) >= 2 and {e["step"] for e in events} <= {3, 6, 9}
    history = {name: [12] for name in summary["ranks"]}
    for event in events:
        for name, (before, after) in event["ranks"].items():
            assert history[name][-1] == before != after
            assert 0.8 <= event["energy"][name] < 1
            history[name].append(after)
    assert summary["ranks"] == {name: ranks[-1] for name, ranks in history.items()}

    model = load(tmp_path / "a")
    assert ranks_of(model) == summary["ranks"]
    assert count_parameters(model) == summary["parameters"] == events[-1]["parameters"]
    falling = [event["parameters"]["total"] for event in events]
    assert falling == sorted(falling, reverse=True)
    cost = flops_per_token(model, 16).training
    assert events[-1]["train_flops_per_token"] == cost
    assert rows[-1]["train_flops"] - rows[-2]["train_flops"] == pytest.approx(32 * cost)
    assert rows[0]["train_flops"] > 32 * cost and summary["train_flops"] == rows[-1]["train_flops"]
    state = json.loads((tmp_path / "a/checkpoints/step-000012/state.json").read_text())
    assert state["ranks"]["now"] == summary["ranks"] and set(state["ranks"]["initial"].values()) == {12}


def test_growth_is_recorded_too(tmp_path, run_config, listen):
    summary = train(run_config(out=tmp_path / "a", **GROW), listen())
    first = changes(tmp_path / "a")[0]
    assert all(after > before for before, after in first["ranks"].values()) and set(first["energy"].values()) == {1.0}
    assert max(summary["ranks"].values()) > 2


@pytest.mark.parametrize(
    ("method", "plan"),
    [*((method, SHRINK) for method in LOW_RANK), ("spectron", GROW), ("tsvd", GROW)],
    ids=[*LOW_RANK, "spectron-growing", "tsvd-growing"],
)
def test_a_run_across_changes_resumes_bit_for_bit(tmp_path, run_config, listen, crash, fingerprint, method, plan):
    """Killed in the step of a change, before that is saved, and in the step after a change that was saved."""
    common = plan | {"method": method, "train__checkpoint_every": 2}
    train(run_config(out=tmp_path / "straight", **common), listen())
    assert changes(tmp_path / "straight")
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "killed", **common), listen(crash_after=3))
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "killed", resume="auto", **common), listen(crash_after=7))
    train(run_config(out=tmp_path / "killed", resume="auto", **common), listen())
    assert fingerprint(tmp_path / "killed", 12) == fingerprint(tmp_path / "straight", 12)
    assert changes(tmp_path / "killed") == changes(tmp_path / "straight")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed/model" / name).read_bytes() == (tmp_path / "straight/model" / name).read_bytes()


def test_without_a_schedule_nothing_changes(tmp_path, run_config, listen):
    summary = train(run_config(out=tmp_path / "a", rank__value=12), listen())
    assert not changes(tmp_path / "a") and set(summary["ranks"].values()) == {12}
    assert {row["event"] for row in read_rows(tmp_path / "a") if "event" in row} == {"start", "end"}


def test_ranks_can_be_chosen_once_after_a_warm_up_at_full_rank(tmp_path, run_config, listen):
    common = SHRINK | {"rank__adapt__mode": "once", "rank__ratio": 1.0}
    for key in ("rank__value", "rank__adapt__every", "rank__adapt__hysteresis"):
        del common[key]
    summary = train(run_config(out=tmp_path / "a", **common), listen())
    (event,) = changes(tmp_path / "a")
    assert event["step"] == 3 and all(before in (16, 32) for before, _ in event["ranks"].values())
    assert summary["ranks"] == {name: after for name, (_, after) in event["ranks"].items()}


def test_the_guard_goes_back_across_a_change(tmp_path, run_config, listen, monkeypatch):
    from nativerank.train import step

    original, calls = step.mean_loss, []

    def planted(*args, **options):
        calls.append(1)
        return original(*args, **options) + (9.0 if len(calls) == 8 else 0.0)

    monkeypatch.setattr(step, "mean_loss", planted)
    guard = {"guard__action": "rollback", "guard__window": 3, "train__checkpoint_every": 5}
    summary = train(run_config(out=tmp_path / "a", **SHRINK, **guard), listen())
    rolled = next(row for row in read_rows(tmp_path / "a") if "rolled_back_to" in row)
    assert (rolled["step"], rolled["rolled_back_to"]) == (8, 5)
    assert [event["step"] for event in changes(tmp_path / "a")].count(6) == 2, "its change was undone and came again"
    assert ranks_of(load(tmp_path / "a")) == summary["ranks"]


def test_norms_that_a_change_balanced_are_no_spike(tmp_path, run_config, listen):
    common = SHRINK | {"method": "lowrank-adamw", "train__probe_every": 1, "guard__sigma_factor": 1.0001}
    train(run_config(out=tmp_path / "a", **common | {"optim__lr": 0.0}), listen())
    assert not [row for row in read_rows(tmp_path / "a") if row.get("event") == "sigma_spike"]


def test_training_goes_on_from_a_model_with_its_ranks_and_adapts_those(tmp_path, run_config, listen):
    first = train(run_config(out=tmp_path / "a", **SHRINK), listen())
    again = {k: v for k, v in SHRINK.items() if k != "rank__value"} | {"rank__adapt__threshold": 0.6}
    second = train(run_config(out=tmp_path / "b", init=tmp_path / "a", **again), listen())
    state = json.loads((tmp_path / "b/checkpoints/step-000012/state.json").read_text())
    assert state["ranks"]["initial"] == first["ranks"]
    assert all(second["ranks"][name] <= rank for name, rank in first["ranks"].items())
    assert second["parameters"]["total"] < first["parameters"]["total"]


def test_updates_inside_the_backward_pass_meet_changed_ranks(tmp_path, run_config, listen, fingerprint):
    common = SHRINK | {"optim__clip": 0.0}
    train(run_config(out=tmp_path / "a", **common), listen())
    train(run_config(out=tmp_path / "b", optim__layerwise=True, **common), listen())
    assert changes(tmp_path / "a") == changes(tmp_path / "b")
    assert fingerprint(tmp_path / "a", 12)[:2] == fingerprint(tmp_path / "b", 12)[:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank__value": 10}, r"step-000006 began with rank 12 in model\.layers\.0\.\S+, this configuration with 10"),
        ({"rank__adapt__threshold": None}, r"step-000006 has rank \d+ in \S+, this configuration 12; see rank\.adapt"),
    ],
)
def test_a_checkpoint_of_other_ranks_is_refused_in_one_line(tmp_path, run_config, listen, change, message):
    train(run_config(out=tmp_path / "a", train__checkpoint_every=6, **SHRINK), listen())
    common = {k: v for k, v in (SHRINK | change).items()}
    if change.get("rank__adapt__threshold", 1) is None:
        common = {k: v for k, v in common.items() if "adapt" not in k}
    with pytest.raises(ValueError, match=message) as error:
        train(run_config(out=tmp_path / "b", resume=tmp_path / "a/checkpoints/step-000006", **common), listen())
    assert "\n" not in str(error.value)


def test_factors_that_are_not_finite_end_the_run_with_the_layers_name(tmp_path, run_config, listen, monkeypatch):
    from nativerank.train import loop

    step, taken, spoiled = loop.train_step, [], []

    def and_spoil(model, *args, **options):
        taken.append(step(model, *args, **options))
        if len(taken) == 3:
            name, layer = list(factor_layers(model).items())[3]
            spoiled.append(name)
            with torch.no_grad():
                layer.up.weight[0, 0] = math.inf
        return taken[-1]

    monkeypatch.setattr(loop, "train_step", and_spoil)
    with pytest.raises(Diverged) as error:
        train(run_config(out=tmp_path / "a", **SHRINK), listen())
    assert str(error.value).startswith(f"step 3: {spoiled[0]}: a factor holds NaN or infinity")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank.adapt.threshold": 1.5}, "rank.adapt.threshold must lie in (0, 1], got 1.5"),
        ({"rank.adapt.threshold": 0.9, "rank.adapt.max": 999}, "rank.adapt.max 999 is beyond min(d_in, d_out)"),
        ({"rank.adapt.threshold": 0.9, "rank.adapt.min": 33}, "rank.adapt.min 33 is beyond min(d_in, d_out) of every"),
        (
            {"rank.adapt.threshold": 0.9, "method": "sct", "optim.retract_every": 2},
            "rank.adapt reads energies off orthonormal frames, which optim.retract_every 2 does not keep",
        ),
        ({"rank.adapt.treshold": 0.9}, "unknown config key rank.adapt.treshold; did you mean rank.adapt.threshold?"),
        ({"rank.adapt.threshold": 0.9, "method": "dense-muon"}, "rank.adapt.threshold has no meaning"),
        ({"rank.adapt.threshold": 0.9, "compile": "true"}, "drop --compile or rank.adapt"),
        ({"rank.adapt.every": 0.1}, "rank.adapt.every 0.1 has no meaning while rank.adapt.mode is off"),
        ({"rank.adapt.mode": "sometimes"}, "config key rank.adapt.mode must be"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(tmp_path, cli, flags, change, message):
    words = [word for key, value in change.items() for word in (f"--{key}", str(value))]
    result = cli("train", *flags(out=tmp_path / "a"), *words)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "a").exists()
