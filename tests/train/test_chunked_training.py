"""Training with the chunked loss: the run of whole logits up to last digits, and itself bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from nativerank.evaluate import head_loss
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that a tiny batch is more than one chunk, and no whole number of them."""
    monkeypatch.setitem(head_loss.CHUNK_TOKENS, "cpu", 11)


def losses_of(run):
    return [
        [row[key] for key in ("step", "loss", "grad_norm", "val_loss") if key in row]
        for row in read_rows(run)
        if "loss" in row
    ]


def test_it_is_the_run_of_whole_logits_layer_by_layer_resumed_and_accumulated(
    tmp_path, run_config, listen, crash, fingerprint
):
    common = {"optim__clip": 0, "train__checkpoint_every": 2, "train__eval_every": 3}
    whole, chunked, both, split = (tmp_path / name for name in ("whole", "chunked", "both", "split"))
    train(run_config(**common, train__loss="whole", out=whole), listen())
    train(run_config(**common, train__loss="chunked", out=chunked), listen())
    layerwise = {"optim__layerwise": True, "train__recompute": "blocks"}
    with pytest.raises(crash):
        train(run_config(**common, **layerwise, out=both), listen(crash_after=5))
    train(run_config(**common, **layerwise, out=both, resume="auto"), listen())
    assert losses_of(both) == losses_of(chunked)
    assert fingerprint(both, 8) == fingerprint(chunked, 8)
    size = run_config().train.batch_size
    train(run_config(**common, train__batch_size=size // 2, train__accumulation=2, out=split), listen())
    weights = load_file(whole / "model" / "model.safetensors")
    for run in (chunked, split):
        assert losses_of(run) != losses_of(whole), "else the two ways are one"
        for found, wanted in zip(losses_of(run), losses_of(whole), strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)
        for name, weight in load_file(run / "model" / "model.safetensors").items():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-4)


def test_a_run_may_go_on_with_the_other_loss(tmp_path, run_config, listen, crash):
    with pytest.raises(crash):
        train(run_config(train__checkpoint_every=2, out=tmp_path), listen(crash_after=5))
    train(run_config(train__checkpoint_every=2, train__loss="whole", out=tmp_path, resume="auto"), listen())
    assert [row[0] for row in losses_of(tmp_path)] == list(range(1, 9))


def test_with_a_teacher_it_cannot_be_asked_for(tmp_path, flags, cli):
    words = flags(train__loss="chunked", distill__teacher=tmp_path / "none", out=tmp_path / "run")
    result = cli("train", *words)
    assert result.code == 2 and "train.loss chunked cannot go with a teacher" in result.err
    assert not (tmp_path / "run").exists()
