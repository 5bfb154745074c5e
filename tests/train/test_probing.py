"""What a run records of its steps, against the weights themselves; and that recording changes nothing."""

import pytest
import torch

from nativerank.evaluate.probes import probeable
from nativerank.layers import guided_layers
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows


def weights(model):
    """W in float64, formed, of everything that can be probed."""
    found = {}
    for name, get in probeable(model).items():
        parts = [w.detach().double() for w in get()]
        found[name] = parts[0] @ parts[1].mT if len(parts) == 2 else parts[0].clone()
    return found


def probed_rows(folder):
    return {row["step"]: row for row in read_rows(folder) if "probes" in row}


@pytest.fixture
def follow(run_config, listen, built, tmp_path):
    """follow(**changes): the probed rows of a run, and {step: weights} of before the first and after each step."""

    def run(steps=5, **changes):
        history = {}

        class Watching(listen):
            def begin(self, facts):
                super().begin(facts)
                history[facts["step"]] = weights(built[-1].model)

        at_step = {n: lambda n=n: history.__setitem__(n, weights(built[-1].model)) for n in range(1, steps + 1)}
        common = dict(train__probe=["*"], train__probe_every=1, train__steps=steps, out=tmp_path / "run")
        train(run_config(**common | changes), Watching(at_step=at_step))
        return probed_rows(tmp_path / "run"), history

    return run


@pytest.mark.parametrize("method", ["spectron", "lowrank-adamw", "self-guided", "dense-muon"])
def test_update_norms_are_those_of_the_steps_taken(follow, method):
    rows, history = follow(method=method, optim__weight_decay=0.1)
    assert list(rows) == [1, 2, 3, 4, 5]
    for step, row in rows.items():
        assert set(row["probes"]) == set(history[step]) and len(history[step]) == 14
        for name, values in row["probes"].items():
            W, W_before = history[step][name], history[step - 1][name]
            truth = torch.linalg.matrix_norm(W - W_before, 2).item()
            assert values["update_norm"] == pytest.approx(truth, rel=1e-6) and truth > 0
            assert values["sigma_W"] == pytest.approx(torch.linalg.matrix_norm(W, 2).item(), rel=1e-6)
            assert 0 < values["output_change"] < float("inf")
            assert ("gauge" in values) == (method != "dense-muon")
            if method == "spectron":
                assert values["update_ratio"] == pytest.approx(truth / row["lr"], rel=1e-6)
            else:
                assert "update_ratio" not in values, "the rate of this method bounds nothing"


@pytest.mark.parametrize("lr", [0.07, 2.0])
def test_certified_training_stays_within_its_bound(follow, lr):
    """lr 2 would be refused without the certificate; its update is 20 times the tuned one."""
    rows, _ = follow(steps=20, optim__certified=True, optim__lr=lr)
    ratios = [values["update_ratio"] for row in rows.values() for values in row["probes"].values()]
    assert len(ratios) == 20 * 14
    assert max(ratios) <= 1 + 1e-6  # the rounding of the stored factors is outside the promise
    assert max(ratios) > 0.2


def test_weight_decay_is_outside_the_bound_by_no_more_than_itself(follow):
    """||dW|| <= lr + 2 lr decay ||W||; and it is seen, where there is nothing but decay."""
    decay = 3.0
    rows, history = follow(steps=10, optim__certified=True, optim__weight_decay=decay)
    over = 0
    for step, row in rows.items():
        for name, values in row["probes"].items():
            sigma = torch.linalg.matrix_norm(history[step - 1][name], 2).item()
            assert values["update_ratio"] <= (1 + 2 * decay * sigma) * (1 + 1e-6)
            over += values["update_ratio"] > 1
    assert over > 50, "the measured step includes the decay"


def test_a_refused_step_has_changed_nothing(follow, monkeypatch):
    from nativerank.train import guard

    calls = iter(range(1, 100))
    monkeypatch.setattr(
        guard.Guard, "judge_step", lambda self, loss, norm: self._event("loss_spike") if next(calls) == 3 else None
    )
    rows, history = follow()
    refused = rows[3]
    assert refused["action"] == "skip"
    for name, values in refused["probes"].items():
        assert values["update_norm"] == values["output_change"] == 0
        assert "rho" not in values and "update_ratio" not in values
        assert torch.equal(history[3][name], history[2][name]) and values["sigma_A"] > 0
    assert all(values["update_norm"] > 0 for values in rows[4]["probes"].values())


@pytest.mark.parametrize("method", ["spectron", "dense-adamw"])
def test_probing_does_not_change_the_run(tmp_path, run_config, listen, fingerprint, write_hf_config, method):
    """Nor its dropout."""
    gpt2 = write_hf_config(
        model_type="gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3,
    )  # fmt: skip
    common = dict(method=method, model__config=gpt2, data__document_mask=False)
    train(run_config(out=tmp_path / "a", train__probe_every=1, train__probe=["*"], **common), listen())
    train(run_config(out=tmp_path / "b", train__probe_every=0, **common), listen())
    assert not probed_rows(tmp_path / "b")
    assert fingerprint(tmp_path / "a", 8)[:2] == fingerprint(tmp_path / "b", 8)[:2]


def test_a_resumed_run_may_probe_something_else(tmp_path, run_config, listen):
    common = dict(out=tmp_path / "a", optim__schedule="constant", train__probe_every=4)
    train(run_config(train__steps=4, **common), listen())
    train(run_config(train__steps=8, resume="auto", train__probe=["layers.1.*.q_proj"], **common), listen())
    rows = probed_rows(tmp_path / "a")
    assert len(rows[4]["probes"]) == 3 and list(rows[8]["probes"]) == ["model.layers.1.self_attn.q_proj"]


def test_documents_and_self_guidance_are_probed_until_the_guide_is_gone(follow, built):
    rows, _ = follow(method="self-guided", data__document_mask=True, guide__share=0.5)
    assert all(layer.guide is None for layer in guided_layers(built[-1].model).values())
    for step, row in rows.items():  # in the first step alpha is 1, so the factors have no gradient
        assert all((values["output_change"] > 0) == (step > 1) for values in row["probes"].values())


def test_a_pattern_that_matches_nothing_is_one_line_and_no_folder(tmp_path, cli, flags):
    result = cli("train", *flags(out=tmp_path / "run", train__probe='["q_proj", "w1"]'))
    assert result.code == 2 and result.err.count("\n") == 1
    assert "train.probe pattern 'w1' matches none of the 14 weights" in result.err
    assert not (tmp_path / "run").exists()
