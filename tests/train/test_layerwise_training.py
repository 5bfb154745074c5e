"""Training layer by layer and with recomputed blocks: the run of the ordinary step, in less memory."""

import json

import pytest
import torch

from nativerank.config import GuardConfig
from nativerank.methods import build_optimizer
from nativerank.models import materialize, read_hf_config, skeleton
from nativerank.train.guard import Guard
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows
from nativerank.train.step import layerwise_step

BOTH = {"optim__layerwise": True, "train__recompute": "up"}


def losses_of(run):
    return [
        (row["step"], row["loss"], row["grad_norm"], row.get("val_loss")) for row in read_rows(run) if "loss" in row
    ]


@pytest.mark.parametrize("method", ["spectron", "sct", "self-guided"])
def test_a_run_is_the_ordinary_one_and_resumes_as_such(tmp_path, run_config, listen, crash, fingerprint, method):
    common = {"method": method, "optim__clip": 0, "train__checkpoint_every": 2, "train__eval_every": 3}
    plain, layerwise = tmp_path / "plain", tmp_path / "layerwise"
    train(run_config(**common, out=plain), listen())
    with pytest.raises(crash):
        train(run_config(**common, **BOTH, out=layerwise), listen(crash_after=5))
    train(run_config(**common, **BOTH, out=layerwise, resume="auto"), listen())
    assert losses_of(layerwise) == losses_of(plain)
    assert fingerprint(layerwise, 8) == fingerprint(plain, 8)


@pytest.mark.parametrize("method", ["sct", "spectron"])
def test_ranks_that_change_do_so_layer_by_layer_too(tmp_path, run_config, listen, fingerprint, method):
    common = {"method": method, "optim__clip": 0, "rank__adapt__threshold": 0.7, "rank__adapt__min": 2}
    common |= {"rank__adapt__start": 0.2, "rank__adapt__every": 0.2, "rank__adapt__multiple": 1, "rank__value": 12}
    plain, layerwise = tmp_path / "plain", tmp_path / "layerwise"
    train(run_config(**common, out=plain), listen())
    train(run_config(**common, **BOTH, out=layerwise), listen())
    assert any(row.get("event") == "ranks" for row in read_rows(layerwise))
    assert losses_of(layerwise) == losses_of(plain)
    assert fingerprint(layerwise, 8) == fingerprint(plain, 8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "optim.clip 1.0; set --optim.clip 0"),
        ({"optim__clip": 0, "train__accumulation": 2}, "train.accumulation 2; set --train.accumulation 1"),
    ],
)
def test_what_needs_all_gradients_is_refused(tmp_path, cli, flags, changes, named):
    result = cli("train", *flags(**changes, optim__layerwise=True, out=tmp_path / "run"))
    assert result.code == 2 and result.err.count("\n") == 1
    assert "optim.layerwise" in result.err and named in result.err


def test_a_loss_is_judged_alike_with_and_without_its_gradients():
    config = GuardConfig(window=3, loss_jump=1.0)
    one, two = Guard(config), Guard(config)
    for loss in (5.0, 4.9, 4.8, 4.7, 6.5, 4.6, float("nan"), 4.5):
        whole = one.judge_step(loss, 1.0)
        early = two.judge_loss(loss)
        assert whole == (early or two.judge_step(loss, 1.0))
        assert one.state() == two.state()


@pytest.fixture
def layerwise(tiny_config):
    model = materialize(skeleton(read_hf_config(tiny_config)), seed=0, init_scale=1.0).train()
    return model, build_optimizer(model, "dense-adamw", layerwise=True)


def step(model, optimizer, accept_loss=lambda loss: True, accept=lambda loss, norm: True):
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    return layerwise_step(model, optimizer, [(ids[:, :-1], ids[:, 1:], None)], accept_loss, accept, refuse=True)


def test_a_refused_loss_moves_nothing(layerwise):
    before = [p.detach().clone() for p in layerwise[0].parameters()]
    result = step(*layerwise, accept_loss=lambda loss: False)
    assert not result.updated and result.kept == 0 and result.loss > 0
    assert all(torch.equal(p, q) for p, q in zip(layerwise[0].parameters(), before, strict=True))


def test_a_bad_gradient_is_reported_with_what_had_moved(layerwise):
    model, optimizer = layerwise
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.model.layers[0].input_layernorm.weight.register_hook(lambda grad: grad * float("nan"))
    result = step(model, optimizer, accept=lambda loss, norm: norm == norm)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not result.updated and result.grad_norm != result.grad_norm
    assert result.kept == len(moved) and "lm_head.weight" in moved and "model.embed_tokens.weight" not in moved
    assert step(model, optimizer, accept=lambda loss, norm: False).kept > 0  # the next step is a new one


def test_a_run_says_what_a_bad_gradient_left_behind(tmp_path, run_config, listen, monkeypatch):
    from nativerank.train import loop

    real = loop.layerwise_step

    def poisoned(model, *rest, **options):
        weight = model.model.layers[0].self_attn.q_proj.up.weight
        handle = weight.register_hook(lambda grad: grad * float("nan")) if listener.rows[-1].get("step") == 3 else None
        try:
            return real(model, *rest, **options)
        finally:
            if handle:
                handle.remove()

    monkeypatch.setattr(loop, "layerwise_step", poisoned)
    listener = listen()
    listener.rows.append({})
    train(run_config(out=tmp_path / "run", optim__layerwise=True, optim__clip=0, train__eval_every=0), listener)
    row = next(row for row in read_rows(tmp_path / "run") if row.get("event") == "gradient_not_finite")
    assert row["step"] == 4 and row["action"] == "skip" and row["kept"] > 0
    (said,) = listener.said
    assert f"skip, but {row['kept']} parameters had moved" in said
    assert json.loads((tmp_path / "run/checkpoints/step-000008/state.json").read_text())["guard"]["refused"] == 1


def test_the_optimizers_share_of_the_step_is_known(layerwise):
    seconds = step(*layerwise).seconds
    assert list(seconds) == ["forward", "backward", "optimizer", "clip"]
    assert all(s > 0 for s in seconds.values())
