"""The laws of the surgery: the function is kept at full rank, and the way back restores exactly what was there."""

import copy
import pickle
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nativerank.layers.factorize import factorize_modules, to_dense_modules

FAMILIES = ["llama", "qwen2", "mistral", "gpt2", "mixtral"]


def anatomy(model):
    """Everything a round trip must restore: keys with shapes in order, and the type of every module."""
    shapes = [(k, v.shape, v.dtype) for k, v in model.state_dict().items()]
    return shapes, [(n, type(m)) for n, m in model.named_modules()], [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_keeps_the_function_and_the_way_back_too(family, build, tokens):
    model = build(family)
    before, expected = anatomy(model), model(tokens).logits
    report = factorize_modules(model, ratio=1.0)
    assert len(report.entries) == {"gpt2": 8, "mixtral": 12}.get(family, 14)
    assert all(e.rank == min(e.d_in, e.d_out) for e in report.entries)
    assert not any(name == f"{e.name}.weight" for e in report.entries for name in model.state_dict())
    assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert to_dense_modules(model) == list(report.ranks)
    assert anatomy(model) == before
    assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_factor_gets_a_gradient(family, build, tokens):
    model = build(family)
    factorize_modules(model)
    model(tokens, labels=tokens).loss.backward()
    assert all(
        p.grad is not None and p.grad.norm() > 0 for n, p in model.named_parameters() if ".up" in n or ".down" in n
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_truncated_model(family, build, tokens):
    model = build(family)
    report = factorize_modules(model, value=3)
    expected = model(tokens).logits
    assert set(report.ranks.values()) == {3}
    to_dense_modules(model)
    assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_factorized_model_work(family, copied, build, tokens):
    model = build(family)
    before = anatomy(model)
    factorize_modules(model)
    twin = copied(model)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    to_dense_modules(twin)
    assert anatomy(twin) == before and anatomy(model) != before


def test_factors_are_the_best_approximation_of_the_weight(build):
    model = build("llama")
    W = model.model.layers[1].mlp.gate_proj.weight.detach().double()
    factorize_modules(model, value=5)
    layer = model.model.layers[1].mlp.gate_proj
    error = (W - layer.to_dense().detach()).square().sum()
    assert_close(error, torch.linalg.svdvals(W)[5:].square().sum(), atol=1e-7, rtol=1e-6)  # factors are float32


def test_embeddings_and_head_stay_dense(build):
    for tie in (False, True):
        model = build("llama", tie_word_embeddings=tie)
        report = factorize_modules(model)
        assert type(model.lm_head) is nn.Linear and "lm_head" not in report.ranks
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def test_a_hugging_face_model_inside_another_module_keeps_its_head(build):
    wrapper = nn.ModuleDict({"lm": build("llama")})
    report = factorize_modules(wrapper)
    assert len(report.entries) == 14 and type(wrapper["lm"].lm_head) is nn.Linear


def test_dtype_device_gradient_flag_mode_and_bias_are_kept(build):
    model = build("qwen2").to(torch.bfloat16).train()
    q_proj = model.model.layers[0].self_attn.q_proj
    q_proj.weight.requires_grad_(False)
    bias = q_proj.bias
    factorize_modules(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.up.weight.dtype == layer.down.weight.dtype == torch.bfloat16
    assert not layer.up.weight.requires_grad and not layer.down.weight.requires_grad
    assert layer.up.bias is bias and bias.requires_grad and layer.training and layer.down.training
    assert model.model.layers[0].self_attn.k_proj.up.weight.requires_grad
    to_dense_modules(model)
    assert model.model.layers[0].self_attn.q_proj is q_proj and q_proj.bias is bias
    assert q_proj.weight.dtype == torch.bfloat16 and not q_proj.weight.requires_grad and q_proj.training


def test_gpt2_counts_a_fused_projection_as_one_matrix(build):
    report = factorize_modules(build("gpt2"), ratio=0.25)
    entry = next(e for e in report.entries if e.name == "transformer.h.0.attn.c_attn")
    assert (entry.kind, entry.d_in, entry.d_out, entry.rank, entry.fused) == ("Conv1D", 32, 96, 8, "q, k and v")
    assert "fused: transformer.h.*.attn.c_attn: q, k and v count as one matrix" in str(report)


def test_the_report_counts_parameters_and_fits_a_terminal(build):
    model = build("mixtral")
    dense = sum(p.numel() for p in model.parameters())
    report = factorize_modules(model)
    assert report.params_before == dense
    assert report.params_after == sum(p.numel() for p in model.parameters())
    assert dense - report.params_after == sum(e.params_before - e.params_after for e in report.entries)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.startswith("..layers.*") or line.startswith("model.layers.*")]) <= 6


def test_meta_device_changes_shapes_only():
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    before, start = anatomy(model), time.perf_counter()
    report = factorize_modules(model, ratio=0.25)
    assert time.perf_counter() - start < 20  # "a few seconds", with room for a busy machine
    assert len(report.entries) == 560 and all(p.is_meta for p in model.parameters())
    assert report.ranks["model.layers.79.self_attn.k_proj"] == 256
    assert report.ranks["model.layers.79.mlp.down_proj"] == 2048
    to_dense_modules(model)
    assert anatomy(model) == before


def test_sampled_and_unfilled_factors(build, tokens):
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    factorize_modules(model, init="sampled", seed=3)
    layer = model.model.layers[0].mlp.up_proj
    expected = torch.linalg.svdvals(weight.double())[: layer.rank].norm()
    assert_close(layer.to_dense().double().norm(), expected, rtol=0.08, atol=0.0)  # a 32 x 48 draw against its law
    again = build("llama")
    factorize_modules(again, init="sampled", seed=3, include="layers.0.mlp.up_proj")
    assert torch.equal(again.model.layers[0].mlp.up_proj.to_dense(), layer.to_dense())  # seeded by name, not by order
    loud = build("llama")
    factorize_modules(loud, init=None)
    assert loud(tokens).logits.isnan().all()


def test_a_zero_weight_is_reported_because_it_cannot_learn():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[1].weight)
    report = factorize_modules(model)
    assert [e.warning is not None for e in report.entries] == [False, True] and "never learn" in report.warnings[0]


def test_importing_the_room_does_not_load_transformers():
    code = "import sys, nativerank.layers; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_replaced():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[2, 3] = float("nan")
    before = [type(m) for m in model]
    with pytest.raises(ValueError, match="1 holds NaN or infinity"):
        factorize_modules(model, value=2)
    assert [type(m) for m in model] == before and model[0].weight is not None
