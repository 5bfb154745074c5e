"""Every preset under every method, and other families: exact FLOPs are those that PyTorch's counter sees.

Shapes are all that it takes, so models and tokens lie on the meta device and a preset runs at its own width, rank,
vocabulary and context; depth is cut to one block, and in full where that is quick. Attention is written out as
products (eager, or the math kernel), because the counter does not see into the CPU's fused one.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nativerank.accounting.flops import flops_per_token
from nativerank.methods import METHODS, factorize
from nativerank.models import PRESETS, hf_config, make_hf_config, skeleton

CONTEXT = 16
FORMS = [(name, frames) for name, row in METHODS.items() for frames in (["both", "one"] if row.one_frame else [None])]
QUICK = [name for name, preset in PRESETS.items() if preset.layers <= 12]  # in full: half a second each
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": None},
    "gpt_neox": {},
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}


def counted(model, context, attention="eager"):
    """(forward, forward and backward) FLOPs per token of one sequence, by PyTorch's counter."""
    model.set_attn_implementation(attention)
    ids = torch.zeros(1, context, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, context, context, device="meta")  # ready-made: making one looks at values
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(input_ids=ids, attention_mask=mask).logits.sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward / context, counter.get_total_flops() / context


def on_meta(preset, method="spectron", frames=None):
    model = skeleton(hf_config(preset))
    if METHODS[method].layer:
        factorize(model, method, rank_ratio=preset.ratio, rank=preset.value, frames=frames)
    return model


def hold(model, context, guided=1.0, attention="eager"):
    flops = flops_per_token(model, context, guided)
    assert (flops.forward, flops.training) == counted(model, context, attention)


@pytest.mark.parametrize(("method", "frames"), FORMS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_block_of_every_preset_under_every_method(name, method, frames):
    preset = replace(PRESETS[name], layers=1)
    hold(on_meta(preset, method, frames), preset.context)


@pytest.mark.parametrize("name", QUICK)
def test_all_blocks_of_the_shallow_presets(name):
    hold(on_meta(PRESETS[name]), PRESETS[name].context)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spectron", "sct", "self-guided", "dense-adamw"])  # one of each kind of layer
@pytest.mark.parametrize("name", PRESETS)
def test_all_blocks_of_every_preset(name, method):
    hold(on_meta(PRESETS[name], method), PRESETS[name].context)


def test_the_math_kernel_counts_as_written_out_attention():
    preset = replace(PRESETS["smollm2-135m"], layers=1)  # grouped keys and values, tied head
    hold(on_meta(preset), preset.context, attention="sdpa")


def test_a_pass_in_which_no_guide_is_computed():
    preset = replace(PRESETS["spectron-s"], layers=1)
    model = on_meta(preset, "self-guided")
    for layer in model.modules():
        if hasattr(layer, "guide"):
            layer.active = False
    hold(model, preset.context, guided=0.0)


@pytest.mark.parametrize("method", ["spectron", "sct", "self-guided", "dense-adamw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, method):
    config = make_hf_config({"model_type": family, **SIZES, **FAMILIES[family]}, None)
    model = skeleton(config)
    if METHODS[method].layer:
        factorize(model, method, rank=5)
    hold(model, CONTEXT)
