"""int8 weights: within half a step, few bytes, and nothing is done to factors that are no longer there."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import nativerank as nr
from nativerank.accounting.memory import weights_bytes
from nativerank.integrations.quantize import quantize
from nativerank.models import read_hf_config
from nativerank.train.loop import train

pytest.importorskip("torchao", reason="needs the extra `quantize`")
EXAMPLE = Path(__file__).parents[2] / "examples/quantize_int8.py"


@pytest.fixture
def build(write_hf_config):
    def make(method="spectron", **changes):
        torch.manual_seed(0)
        model = LlamaForCausalLM(read_hf_config(write_hf_config(**changes))).eval()
        if method:
            nr.factorize(model, method, rank=8)
        return model

    return make


IDS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("method", ["spectron", "sct", None])
def test_every_weight_is_off_by_half_a_step_at_most(build, method):
    model = build(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = model(IDS).logits
    done = quantize(model)
    assert len(done.matrices) == 2 * 7 * (2 if method else 1)
    for name, p in model.named_parameters():
        W = before[name]
        if name.removesuffix(".weight") in done.matrices:
            step = W.abs().amax(1, keepdim=True) / 127
            assert ((p.dequantize() - W).abs() <= step / 2 * 1.01).all() and not p.requires_grad, name
            assert not torch.equal(p.dequantize(), W)
        else:
            assert torch.equal(p, W), name
    found = model(IDS).logits
    assert not torch.equal(found, logits) and (found - logits).norm() < 0.05 * logits.norm()


def test_bytes_are_those_of_codes_and_scales(build):
    model = build()
    linears = [model.get_submodule(name).weight for name in quantize(copy.deepcopy(model)).matrices]
    done = quantize(model)
    saved = sum(3 * W.numel() - 5 * len(W) for W in linears)  # of a row a float scale, and torchao's zero point
    assert done.bytes_before - done.bytes_after == saved and done.bytes_after == weights_bytes(model)
    assert str(done) == f"28 matrices in int8, {done.bytes_before:,} -> {done.bytes_after:,} bytes"


@pytest.mark.parametrize("method", ["spectron", None])
def test_a_second_time_is_refused(build, method):
    model = build(method)
    done = quantize(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model, head=True)
    assert weights_bytes(model) == done.bytes_after


def test_the_head_only_on_request_and_never_with_the_embedding(build):
    assert "lm_head" not in quantize(build()).matrices
    assert "lm_head" in quantize(build(), head=True).matrices
    with pytest.raises(ValueError, match="the output head is the embedding too"):
        quantize(build(tie_word_embeddings=True), head=True)
    with pytest.raises(ValueError, match="no output head that is a linear layer"):
        quantize(nn.Sequential(nn.Linear(4, 4)), head=True)


def test_factors_that_are_gone_are_not_looked_at_saved_or_trained(build, tmp_path):
    model = build()
    quantize(model)
    layer = model.model.layers[0].mlp.up_proj
    for look in (layer.factors, layer.to_dense, layer.spectrum):
        with pytest.raises(ValueError, match="is quantized and has no factors to look at any more"):
            look()
    assert layer.gemms()[0].k == 32, "what a forward pass costs is known"
    for saved, said in (("factored", "save the model before it is quantized"), ("dense", "has no factors to look at")):
        with pytest.raises(ValueError, match=said):
            nr.save(model, tmp_path / saved, saved)
        assert not (tmp_path / saved).exists()
    with pytest.raises(ValueError, match="frozen"):
        nr.build_optimizer(model, "spectron")


def test_without_anything_to_quantize_or_an_unknown_format_it_says_so(build):
    with pytest.raises(ValueError, match="found no linear layer"):
        quantize(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="quantize must be int8, got 'int3'"):
        quantize(build(), "int3")


@pytest.fixture(scope="module")
def run(tmp_path_factory, prepared, tiny_config):
    from nativerank.config import RunConfig, from_dict

    out = tmp_path_factory.mktemp("runs") / "tiny"
    values = {
        "out": str(out),
        "device": "cpu",
        "data": {"path": str(prepared)},
        "model": {"config": tiny_config},
        "train": {"steps": 60, "context": 32, "batch_size": 8, "accumulation": 1, "eval_every": 0},
    }

    class Quiet:
        quiet = True

        def begin(self, facts): ...
        def row(self, row): ...
        def warn(self, message): ...

    train(from_dict(RunConfig, values), Quiet())
    return out


def test_the_example_tells_the_loss_before_and_after(run, capsys):
    spec = importlib.util.spec_from_file_location("quantize_int8", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.compare(str(run))
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert before == pytest.approx(written[-1]["val_loss"], abs=0.05), "windows begin elsewhere"
    assert 0 < abs(after - before) < 0.02 and before < 5
    printed = capsys.readouterr().out
    assert "28 matrices in int8" in printed and f"{before:.4f} -> {after:.4f} nats" in printed


def test_generate_writes_from_int8_factors_and_from_an_int8_merged_matrix(cli, run):
    words = ["--prompt", "the low rank", "--max_new_tokens", "8", "--temperature", "0"]
    plain = cli("generate", run, *words, "--quiet").out
    for form, count in (("factored", 28), ("merged", 14)):
        found = cli("generate", run, *words, "--quantize", "int8", "--form", form)
        assert found.code == 0 and f"{count} matrices in int8" in found.err, found.err
        assert found.out.startswith("the low rank") and len(found.out) > 0.5 * len(plain)


def test_eval_scores_int8_beside_the_weights_as_they_are(cli, run, tmp_path):
    found = {}
    for words in ([], ["--quantize", "int8"]):
        file = tmp_path / f"scores{len(words)}.json"
        done = cli("eval", run, "--json", file, *words)
        assert (done.code, done.err) == (0, "")
        scores = json.loads(file.read_text())
        (model,) = scores["models"].values()
        (score,) = model["scores"].values()
        found[scores["quantize"]] = model["parameters"], score["metrics"]["bits_per_byte"]["value"]
    assert found[None][0] == found["int8"][0] and 0 < abs(found[None][1] - found["int8"][1]) < 0.01
