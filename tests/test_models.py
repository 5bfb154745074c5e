"""Presets have the published sizes, and every method starts from the same matrices."""

import json

import pytest
import torch

from nativerank.layers import linear_modules
from nativerank.layers.base import factor_layers
from nativerank.methods import METHODS, factorize
from nativerank.models import (
    DENSE,
    PRESETS,
    allocate,
    count_parameters,
    find_preset,
    hf_config,
    make_hf_config,
    materialize,
    read_hf_config,
    skeleton,
)

FAMILIES = {
    "llama": {},
    "qwen2": dict(attention_bias=True),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=32),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": {},
}


def family(name, **changes):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=2)
    sizes |= dict(max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    values = {"model_type": name, "vocab_size": 64, **({} if name == "gpt2" else sizes), **FAMILIES[name], **changes}
    return make_hf_config(values | ({"bos_token_id": 0, "eos_token_id": 0} if name == "gpt2" else {}), "test")


def low_rank(config, seed=3, init="svd", **ranks):
    model = skeleton(config)
    factorize(model, "spectron", **(ranks or {"rank_ratio": 0.25}))
    return materialize(model, seed, 0.5, init)


def dense(config, seed=3):
    return materialize(skeleton(config), seed, 0.5)


# -- sizes


def millions(name):
    """Parameters on the meta device, built as a run builds them."""
    preset = find_preset(name)
    model = skeleton(hf_config(preset))
    if METHODS[preset.method].layer and not name.endswith(DENSE):
        factorize(model, preset.method, rank_ratio=preset.ratio, rank=preset.value)
    assert all(p.is_meta for p in model.parameters())
    return count_parameters(model)["total"] / 1e6


@pytest.mark.parametrize(
    ("name", "size", "digits"),
    [
        ("spectron-s", 93.60, 2),
        ("spectron-m", 296.93, 2),
        ("spectron-l", 453.85, 2),
        ("spectron-s-dense", 134.11, 2),
        ("spectron-m-dense", 488.30, 2),
        ("spectron-l-dense", 777.86, 2),
        ("llama-60m", 42.8, 1),
        ("llama-130m", 94.0, 1),
        ("llama-350m", 185.2, 1),
        ("llama-1b", 609.3, 1),
        ("llama-60m-dense", 58.1, 1),
        ("llama-130m-dense", 134.1, 1),
        ("llama-350m-dense", 368.0, 1),
        ("llama-1b-dense", 1339.1, 1),
        ("smollm2-135m-dense", 134.5, 1),
        ("smollm2-1.7b-dense", 1711.4, 1),
        ("llama3-70b-dense", 70553.7, 1),
    ],
)
def test_presets_have_the_published_sizes(name, size, digits):
    assert round(millions(name), digits) == size


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_whole(name):
    preset = find_preset(name)
    assert preset.method in METHODS and METHODS[preset.method].layer
    assert preset.d_model % preset.heads == 0 and preset.heads % (preset.kv_heads or preset.heads) == 0
    assert (preset.ratio is None) != (preset.value is None)
    twin = find_preset(name + DENSE)
    assert twin.method == "dense-adamw" and (twin.d_model, twin.layers) == (preset.d_model, preset.layers)


def test_a_preset_takes_the_vocabulary_and_context_of_the_run():
    config = hf_config(find_preset("pocket"), vocab_size=999, context=77)
    assert (config.vocab_size, config.max_position_embeddings) == (999, 77)


def test_count_parameters_leaves_out_both_ends():
    untied, tied = dense(family("llama")), dense(family("llama", tie_word_embeddings=True))
    counts, tied_counts = count_parameters(untied), count_parameters(tied)
    assert counts["total"] - counts["non_embedding"] == 2 * 64 * 32
    assert tied_counts["total"] - tied_counts["non_embedding"] == 64 * 32
    assert counts["non_embedding"] == tied_counts["non_embedding"]


# -- starting weights


@pytest.mark.parametrize("name", FAMILIES)
def test_low_rank_starts_from_the_truncation_of_what_dense_starts_from(name):
    """For every matrix, by an SVD in float64; everything else bit for bit."""
    big, small = dense(family(name)), low_rank(family(name))
    matrices = linear_modules(big)
    factored = factor_layers(small)
    assert set(factored) == set(matrices) and len(factored) >= 8
    for key, matrix in matrices.items():
        U, S, Vh = torch.linalg.svd(matrix.weight.detach().double(), full_matrices=False)
        r = factored[key].rank
        best = U[..., :r] * S[..., None, :r] @ Vh[..., :r, :]
        torch.testing.assert_close(factored[key].to_dense().double(), best, rtol=0, atol=1e-5)  # float32 SVD
        std = matrix.weight.std().item() * matrix.d_in**0.5
        assert std == pytest.approx(0.5, rel=0.15), "init_scale / sqrt(fan_in)"
    others = dict(big.named_parameters())
    compared = 0
    for key, p in small.named_parameters():
        key = key.replace(".up.bias", ".bias")
        if key in others:
            assert torch.equal(p, others[key]), key
            compared += 1
    assert compared == len(others) - len(matrices)


@pytest.mark.parametrize("name", FAMILIES)
def test_buffers_and_the_rest_are_hugging_faces_own(name):
    from transformers import AutoModelForCausalLM

    model = dense(family(name)).eval()
    stock = AutoModelForCausalLM.from_config(family(name)).eval()
    stock.load_state_dict(model.state_dict())
    tokens = torch.arange(18).view(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, rtol=0, atol=0)
    norms = [p for n, p in model.named_parameters() if "norm" in n.lower() and n.endswith("weight")]
    assert all((p == 1).all() for p in norms)


def test_the_same_seed_gives_the_same_bits_and_another_gives_others():
    a, b, c = (dict(low_rank(family("llama"), seed).named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a if "norm" not in k)


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    low_rank(family("mixtral"))
    assert torch.equal(before, torch.get_rng_state())


def test_a_module_more_changes_no_other():
    """Numbers come from the seed and the name, not from the order."""
    deep, shallow = (dict(dense(family("llama", num_hidden_layers=n)).named_parameters()) for n in (3, 2))
    assert all(torch.equal(shallow[k], deep[k]) for k in shallow)


def test_sampled_factors_have_the_scale_of_truncated_ones():
    a, b = (factor_layers(low_rank(family("llama"), init=init, rank=16)) for init in ("svd", "sampled"))
    for key in a:
        assert not torch.equal(a[key].up.weight, b[key].up.weight)
        torch.testing.assert_close(
            a[key].spectrum(), b[key].spectrum(), rtol=0.35, atol=0
        )  # 32 x 32: large fluctuation


def test_no_dense_matrix_is_ever_allocated(monkeypatch):
    """init sampled: no tensor as large as a hidden matrix, the embeddings apart."""
    from torch.utils._python_dispatch import TorchDispatchMode

    config = family("llama", hidden_size=64, intermediate_size=256, vocab_size=8, num_attention_heads=4)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor) and not t.is_meta and t.ndim == 2:
                    largest.append(t.numel())
            return out

    with Watch():
        low_rank(config, init="sampled", rank=4)
    assert max(largest) <= 256 * 4 < 64 * 64


def test_the_embedding_can_have_its_own_scale():
    config = family("llama", vocab_size=2000)
    model = materialize(skeleton(config), 0, 0.5, embedding_std=0.3)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.3, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(config.initializer_range, rel=0.02)


def test_tied_weights_are_one_after_building():
    for model in (low_rank(family("llama", tie_word_embeddings=True)), low_rank(family("gpt2"))):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_allocate_makes_rotary_tables_right():
    from transformers import AutoModelForCausalLM

    model = allocate(skeleton(family("llama", rope_theta=123.0)))
    stock = AutoModelForCausalLM.from_config(family("llama", rope_theta=123.0))
    for (name, ours), (_, theirs) in zip(model.named_buffers(), stock.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


# -- configs


def test_a_config_is_read_from_a_file_or_its_folder(tmp_path, tiny_config):
    from pathlib import Path

    assert read_hf_config(tiny_config).hidden_size == 32
    assert read_hf_config(str(Path(tiny_config).parent)).hidden_size == 32
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ValueError, match="names no model_type"):
        read_hf_config(str(tmp_path))


def test_unknown_presets_are_listed():
    with pytest.raises(ValueError, match=r"unknown preset 'pockt'; did you mean pocket\? \(presets: demo, pocket"):
        find_preset("pockt")
    assert find_preset("pocket-dense").method == "dense-adamw"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "spiral"}, "transformers .* knows no model_type 'spiral'$"),
        ({"model_type": ["llama"]}, r"transformers .* knows no model_type \['llama'\]$"),
        ({"num_attention_heads": 0}, "is no valid config: num_attention_heads cannot be 0$"),
    ],
)
def test_a_config_that_makes_no_model_is_named(write_hf_config, changes, said):
    with pytest.raises(ValueError, match=rf"\.json.*{said}"):
        read_hf_config(write_hf_config(**changes))
