"""The spike guard: planted spikes are skipped or undone, and nothing happens where there are none."""

import math

import pytest
import torch

from nativerank.config import GuardConfig
from nativerank.train.guard import Diverged, Guard
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows


def events(run):
    return [(r["event"], r["action"]) for r in read_rows(run) if "action" in r]


def steps(run):
    return [r["step"] for r in read_rows(run) if "loss" in r]


@pytest.fixture
def plant(monkeypatch):
    """plant({forward number: value}): from now on these training forwards get logits times the value."""

    def make(spikes):
        from nativerank.train import step

        count, original = [0], step.mean_loss

        def spiked(model, *args, **options):
            count[0] += 1
            losses = original(model, *args, **options)
            return losses * spikes.get(count[0], 1.0)

        monkeypatch.setattr(step, "mean_loss", spiked)
        return count

    return make


GUARDED = dict(guard__window=3, guard__loss_jump=1.0)


def test_without_spikes_on_is_off_bit_for_bit(tmp_path, run_config, listen, fingerprint):
    for action in ("off", "skip", "rollback"):
        train(run_config(out=tmp_path / action, train__steps=12, guard__action=action, guard__window=3), listen())
        assert events(tmp_path / action) == []
    hashes = {fingerprint(tmp_path / action, 12)[:2] for action in ("off", "skip", "rollback")}
    assert len(hashes) == 1


def test_a_loss_spike_is_skipped(tmp_path, run_config, listen, plant, fingerprint):
    plant({6: 3.0})
    listener = listen()
    summary = train(run_config(out=tmp_path / "a", train__steps=12, **GUARDED), listener)
    assert summary["refused_steps"] == 1
    assert events(tmp_path / "a") == [("loss_spike", "skip")]
    assert steps(tmp_path / "a") == list(range(1, 13))
    assert listener.said == [m for m in listener.said if m.startswith("step 6: loss spike")] != []
    losses = {r["step"]: r["loss"] for r in read_rows(tmp_path / "a") if "loss" in r}
    assert losses[12] < losses[1] and losses[6] > 2 * losses[5]


def test_a_skipped_step_moves_nothing(tmp_path, run_config, listen, plant, built):
    plant({6: 3.0})
    seen = []

    def look():
        seen.append([p.detach().clone() for p in built[0].model.parameters()])

    train(run_config(out=tmp_path / "a", **GUARDED), listen(at_step={5: look, 6: look, 7: look}))
    before, at, after = seen
    assert all(torch.equal(p, q) for p, q in zip(before, at, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(at, after, strict=True))


def test_a_loss_spike_is_rolled_back_and_training_goes_on(tmp_path, run_config, listen, plant):
    plant({7: 3.0})
    common = dict(guard__action="rollback", train__checkpoint_every=2, train__steps=12, train__eval_every=2)
    summary = train(run_config(out=tmp_path / "a", **common, **GUARDED), listen())
    assert events(tmp_path / "a") == [("loss_spike", "rollback")] and summary["refused_steps"] == 1
    (row,) = [r for r in read_rows(tmp_path / "a") if "action" in r]
    assert (row["step"], row["rolled_back_to"]) == (7, 6)
    assert "val_loss" not in row, "the step it went back to was validated before"
    # Step 7 came twice: undone, and again on the data that follow the spike.
    assert steps(tmp_path / "a") == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12]
    final = [r for r in read_rows(tmp_path / "a") if "loss" in r][-1]
    assert final["loss"] < read_rows(tmp_path / "a")[1]["loss"]


def test_a_guide_fades_by_the_step_whatever_the_guard_does(tmp_path, run_config, listen, plant):
    """Refused steps count, and a run set back across the guide's end has its guide again."""
    from nativerank.layers.guided import guide_weight

    plant({4: 3.0, 15: 3.0})  # two forwards a step: in steps 2 and 8
    common = dict(method="self-guided", train__steps=12, train__accumulation=2, train__checkpoint_every=4)
    guard = dict(guard__window=1, guard__loss_jump=1.0, guard__action="rollback")
    train(run_config(out=tmp_path / "a", **common, **guard), listen())
    rows = [r for r in read_rows(tmp_path / "a") if "loss" in r]
    assert events(tmp_path / "a") == [("loss_spike", "skip"), ("loss_spike", "rollback")]
    assert [r["step"] for r in rows] == [*range(1, 9), *range(5, 13)], "step 8 went back to 4, before the end at 6"
    for row in rows:
        assert row["guide_alpha"] == guide_weight(row["step"] - 1, 6)
    assert rows[0]["guide_alpha"] == 1 and rows[-1]["guide_alpha"] == 0


def test_the_data_go_on_after_a_rollback(tmp_path, run_config, listen, plant):
    plant({7: 3.0})
    common = dict(guard__action="rollback", train__checkpoint_every=2, **GUARDED)
    from nativerank.train import checkpoint

    train(run_config(out=tmp_path / "a", **common), listen())
    state = checkpoint.read_state(tmp_path / "a/checkpoints/step-000008")
    assert state["loader"]["samples"] == 2 * (8 + 1), "one batch more than steps"


def test_a_run_killed_after_a_rollback_resumes_bit_for_bit(
    tmp_path, run_config, listen, crash, plant, fingerprint, monkeypatch
):
    """The replay meets the same spike (planted by data, not by count) and goes the same way."""
    from nativerank.train import step

    common = dict(guard__action="rollback", train__checkpoint_every=4, train__steps=12, **GUARDED)
    original, marked = step.mean_loss, []

    def spiked(model, inputs, *rest, **options):
        losses = original(model, inputs, *rest, **options)
        if not marked and model.training:
            spiked.count = getattr(spiked, "count", 0) + 1
            if spiked.count == 7:
                marked.append(inputs.clone())
        return losses * 3.0 if marked and torch.equal(inputs, marked[0]) else losses

    monkeypatch.setattr(step, "mean_loss", spiked)
    train(run_config(out=tmp_path / "a", **common), listen())
    assert events(tmp_path / "a") == [("loss_spike", "rollback")]

    class AfterRollback(listen):
        def row(self, row):
            super().row(row)
            if row.get("step") == 5 and any("rolled_back_to" in r for r in self.rows):
                raise crash

    with pytest.raises(crash):
        train(run_config(out=tmp_path / "b", **common), AfterRollback())
    train(run_config(out=tmp_path / "b", resume="auto", **common), listen())
    assert fingerprint(tmp_path / "a", 12) == fingerprint(tmp_path / "b", 12)


@pytest.mark.parametrize("every", [1, 2])
def test_rollbacks_do_not_loop_for_ever(tmp_path, run_config, listen, plant, every):
    """Every forward from the 9th on is a spike; with a checkpoint at each step nothing may reset the count either."""
    count = plant({n: 3.0 if n % every == 0 else 1.0 for n in range(9, 10_000)})
    common = dict(guard__action="rollback", guard__max_events=3, train__checkpoint_every=2, train__steps=30)
    with pytest.raises(Diverged, match=r"(spikes in a row|rollbacks to step \d+).*last good checkpoint is .*step-0000"):
        train(run_config(out=tmp_path / "a", **common, **GUARDED), listen())
    assert count[0] < 40
    assert events(tmp_path / "a")[-1] == ("loss_spike", "stop")


def test_a_loss_that_is_not_finite_stops_and_names_step_and_checkpoint(tmp_path, cli, flags, plant):
    plant({6: math.nan})
    result = cli("train", *flags(out=tmp_path / "a", train__checkpoint_every=2), "--quiet")
    assert result.code == 3 and result.err.count("\n") == 1
    assert result.err.startswith("nativerank: error: step 6: the loss is not finite")
    assert "the last good checkpoint is" in result.err and "step-000004" in result.err
    last = [r for r in read_rows(tmp_path / "a") if "loss" in r][-1]
    assert (last["loss"], last["event"], last["action"]) == ("nan", "loss_not_finite", "stop")


@pytest.mark.parametrize("action", ["off", "skip", "rollback"])
def test_not_finite_before_the_first_checkpoint_stops(tmp_path, run_config, listen, plant, action):
    plant({3: math.inf})
    with pytest.raises(Diverged, match=r"step 3: the loss is not finite.*there is no checkpoint yet") as stopped:
        train(run_config(out=tmp_path / "a", guard__action=action), listen())
    assert ("set --guard.action rollback" in str(stopped.value)) == (action != "rollback")


def test_not_finite_is_rolled_back_if_asked(tmp_path, run_config, listen, plant):
    plant({6: math.nan})
    summary = train(run_config(out=tmp_path / "a", train__checkpoint_every=2, guard__action="rollback"), listen())
    assert events(tmp_path / "a") == [("loss_not_finite", "rollback")]
    assert math.isfinite(summary["val_loss"]) and summary["step"] == 8


def test_a_gradient_that_is_not_finite_is_left_out(tmp_path, run_config, listen, built):
    def poison():
        handle = built[0].model.lm_head.weight.register_hook(lambda grad: handle.remove() or grad * math.inf)

    train(run_config(out=tmp_path / "a"), listen(at_step={4: poison}))
    assert events(tmp_path / "a") == [("gradient_not_finite", "skip")]
    assert all(torch.isfinite(p).all() for p in built[0].model.parameters())


def test_a_sigma_spike_sets_back_even_under_skip(tmp_path, run_config, listen, built):
    factors = iter([50.0])  # only the first time that step 5 comes

    def blow_up():
        with torch.no_grad():
            built[0].model.model.layers[0].self_attn.q_proj.up.weight *= next(factors, 1.0)

    common = dict(train__probe_every=2, train__checkpoint_every=4, train__steps=10, guard__loss_jump=100.0)
    train(run_config(out=tmp_path / "a", **common), listen(at_step={5: blow_up}))
    assert events(tmp_path / "a") == [("sigma_spike", "rollback")]
    (row,) = [r for r in read_rows(tmp_path / "a") if "action" in r]
    assert (row["step"], row["rolled_back_to"]) == (6, 4)
    last = [r for r in read_rows(tmp_path / "a") if "probes" in r][-1]
    assert last["probes"]["model.layers.0.self_attn.q_proj"]["sigma_A"] < 5


def test_a_sigma_spike_without_a_checkpoint_is_reported_once(tmp_path, run_config, listen, built):
    def blow_up():
        with torch.no_grad():
            built[0].model.model.layers[0].self_attn.q_proj.up.weight *= 50

    train(run_config(out=tmp_path / "a", train__probe_every=2), listen(at_step={3: blow_up}))
    assert events(tmp_path / "a") == [("sigma_spike", "none")]


# -- the judge alone


def test_nothing_is_judged_before_the_first_window_is_over():
    guard = Guard(GuardConfig(window=3, loss_jump=0.5))
    assert [guard.judge_step(loss, 1.0) for loss in (1.0, 9.0, 1.0)] == [None] * 3
    assert guard.judge_step(11 / 3 + 0.51, 1.0) == "loss_spike"
    assert guard.judge_step(11 / 3 + 0.49, 1.0) is None


def test_the_running_mean_ignores_spikes():
    guard = Guard(GuardConfig(window=2, loss_jump=0.5))
    for loss in (1.0, 1.0, 50.0, 1.0):
        guard.judge_step(loss, 1.0)
    assert guard.mean == 1.0 and guard.seen == 3 and guard.in_a_row == 0


def test_too_many_in_a_row_stop():
    guard = Guard(GuardConfig(window=1, max_events=2))
    guard.judge_step(1.0, 1.0)
    for _ in range(2):
        assert guard.response(guard.judge_step(9.0, 1.0), False) == "skip"
    with pytest.raises(Diverged, match=r"3 spikes in a row \(last: loss_spike\)"):
        guard.response(guard.judge_step(9.0, 1.0), False)


def test_the_state_is_json_and_comes_back():
    import json

    guard = Guard(GuardConfig(window=2))
    for judged in (guard, Guard(GuardConfig(window=2))):
        again = Guard(GuardConfig(window=2))
        again.load_state(json.loads(json.dumps(judged.state(), allow_nan=False)))
        assert str(again) == str(judged)
        guard.judge_step(1 / 3, 1.0)
        guard.judge_norms({"a": 1.1})


def test_a_norm_from_zero_is_no_spike():
    guard = Guard(GuardConfig(sigma_factor=2.0))
    assert guard.judge_norms({"a": 0.0}) is None
    assert guard.judge_norms({"a": 5.0}) is None
    assert guard.judge_norms({"a": 10.0}) is None
    assert guard.judge_norms({"a": 20.1}) == "sigma_spike"
    assert guard.judge_norms({"a": math.nan}) == "sigma_spike"
