"""Factored and merged say the same; `auto` takes what a measurement says is done first, else counts."""

import copy

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from nativerank.hub import forms
from nativerank.hub.forms import Choice, Size, Work, choose, measurements, place, remember, size_of, take_form
from nativerank.hub.generate import generate
from nativerank.layers import factorize_modules
from nativerank.layers.base import factor_layers
from nativerank.models import materialize, read_hf_config, skeleton

CPU = torch.device("cpu")
WORK = Work(batch=1, prompt_tokens=8, new_tokens=16)


def build(config, kind="lowrank", **rank):
    model = skeleton(read_hf_config(config))
    factorize_modules(model, kind=kind, **(rank or {"ratio": 0.25}))
    model = materialize(model, 0, 3.0).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # clear logits
    return model


GPT2 = dict(model_type="gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
MIXTRAL = dict(
    model_type="mixtral", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@pytest.fixture(params=[({}, "lowrank"), ({}, "spectral"), (GPT2, "lowrank"), (MIXTRAL, "lowrank")], ids=str)
def model(request, write_hf_config):
    changes, kind = request.param
    return build(write_hf_config(**changes), kind)


def test_both_forms_write_the_same(model, prepared):
    from nativerank.data.shards import Dataset

    data, merged = Dataset.open(prepared), copy.deepcopy(model)
    assert take_form(merged, "merged", WORK, CPU) == Choice("merged", "as asked") and not factor_layers(merged)
    assert take_form(model, "factored", WORK, CPU) == Choice("factored", "as asked") and factor_layers(model)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        ours, theirs = model(ids).logits, merged(ids).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    how = dict(eot_id=data.eot_id, temperature=0, max_new_tokens=15)
    texts = [generate(m, data.tokenizer(), "the low rank", **how) for m in (model, merged)]
    assert texts[0] == texts[1] != ""


def test_the_share_is_that_of_the_multiplications_that_run(model):
    """The counter sees everything else too, and that is the same in both forms."""
    size, merged = size_of(model), copy.deepcopy(model)
    take_form(merged, "merged", WORK, CPU)
    if hasattr(merged.config, "num_local_experts"):
        merged.set_experts_implementation("eager")  # the counter does not know the grouped one
    flops = []
    for one in (model, merged):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(torch.arange(10)[None])
        flops.append(counter.get_total_flops())
    assert_close(flops[1] - flops[0], 2 * 10 * size.dense * (1 - size.share), check_dtype=False, rtol=0, atol=0.5)


def test_without_a_measurement_the_fewer_multiplications_win(write_hf_config):
    config = write_hf_config(num_key_value_heads=2)
    choice = take_form(build(config, ratio=0.25), "auto", WORK, CPU)
    assert choice.form == "factored" and choice.reason.startswith("counted, 0.")
    beyond = build(config, value=24)  # of width 32: beyond the break-even rank of every matrix
    assert take_form(beyond, "auto", WORK, CPU).form == "merged"
    assert take_form(beyond, "auto", WORK, CPU) == Choice("dense", "the model holds no factors")  # it was merged


def measured(batches=((1, 1.0, 2.0), (8, 2.0, 1.0)), merge_seconds=0.0, size=None, noise=0.0, **place_changes):
    """(batch, seconds of a factored token, seconds of a merged one); prompts cost nothing."""
    size = size or Size(1000.0, 0.5)

    def times(seconds):
        return {"prefill_seconds": 0.0, "token_seconds": seconds}

    return {
        "place": place(CPU) | place_changes,
        "dense": size.dense,
        "share": size.share,
        "merge_seconds": merge_seconds,
        "noise": noise,
        "prompt_tokens": 8,
        "new_tokens": 4,
        "batches": [{"batch": b, "factored": times(f), "merged": times(m)} for b, f, m in batches],
    }


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NATIVERANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("batch", "form"), [(1, "factored"), (2, "factored"), (3, "merged"), (64, "merged")])
def test_the_nearest_measured_batch_decides(cache, batch, form):
    remember([measured()])
    choice = choose(Size(1000.0, 0.5), Work(batch, 8, 16), CPU)
    assert choice == Choice(form, f"measured at batch {1 if form == 'factored' else 8}, 2.00x as fast")


@pytest.mark.parametrize(("new_tokens", "form"), [(5, "factored"), (500, "merged")])
def test_merging_must_pay_within_the_work(cache, new_tokens, form):
    remember([measured(merge_seconds=20.0)])
    choice = choose(Size(1000.0, 0.5), Work(8, 8, new_tokens), CPU)
    assert choice.form == form and choice.reason.endswith("x as fast with merging")


@pytest.mark.parametrize(
    ("noise", "ahead", "found"),
    [(0.0, 1.04, "counted"), (0.0, 1.06, "measured"), (0.2, 1.19, "counted"), (0.2, 1.21, "measured")],
)
def test_noise_decides_nothing(cache, noise, ahead, found):
    """Merged is ahead; counting says factored."""
    remember([measured(batches=[(8, ahead, 1.0)], noise=noise)])
    choice = choose(Size(1000.0, 0.5), Work(8, 8, 16), CPU)
    assert choice.form == ("merged" if found == "measured" else "factored") and choice.reason.startswith(found)
    assert (f"within the noise of {max(noise, 0.05):.0%}" in choice.reason) == (found == "counted")


@pytest.mark.parametrize(
    "other",
    [
        measured(size=Size(1000.0 * 4.1, 0.5)),
        measured(size=Size(1000.0, 0.5 * 1.26)),
        measured(device="cpu: another"),
        measured(threads=99),
    ],
)
def test_a_measurement_of_something_else_is_not_asked(cache, other):
    remember([other])
    assert choose(Size(1000.0, 0.5), Work(8, 8, 16), CPU).reason.startswith("counted")


def test_the_most_similar_model_is_asked(cache):
    other = measured(size=Size(1500.0, 0.5), batches=[(8, 1.0, 3.0)])
    remember([other, measured()])
    assert "of an alike model" not in choose(Size(1000.0, 0.5), Work(8, 8, 16), CPU).reason
    choice = choose(Size(1100.0, 0.5), Work(8, 8, 16), CPU)
    assert choice == Choice("merged", "measured at batch 8 of an alike model, 2.00x as fast")
    assert choose(Size(1400.0, 0.5), Work(8, 8, 16), CPU).form == "factored"


def test_a_new_measurement_takes_the_place_of_the_old_one(cache):
    remember([measured(), measured(size=Size(5.0, 0.1))])
    newer = measured(batches=[(8, 1.0, 9.0)])
    assert remember([newer]) == cache / forms.FILE
    assert measurements() == [measured(size=Size(5.0, 0.1)), newer] and len(list(cache.iterdir())) == 1


def test_a_measurement_that_cannot_be_kept_leaves_nothing_behind(cache, monkeypatch):
    def full(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(forms.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        remember([measured()])
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", '{"version": 0, "measurements": [1]}', '{"version": 1}'])
def test_a_file_that_cannot_be_read_counts_as_none(cache, text):
    cache.mkdir()
    (cache / forms.FILE).write_text(text)
    assert measurements() == []
    remember([measured()])
    assert measurements() == [measured()]


def test_bad_forms(tiny_config):
    model = build(tiny_config)
    with pytest.raises(ValueError, match="form must be one of auto, factored, merged, got 'dense'"):
        take_form(model, "dense", WORK, CPU)
    take_form(model, "merged", WORK, CPU)
    with pytest.raises(ValueError, match="form factored: the model holds no factors"):
        take_form(model, "factored", WORK, CPU)
