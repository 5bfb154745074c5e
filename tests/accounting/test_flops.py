"""Counted FLOPs are what PyTorch's counter sees, forward and backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nativerank.accounting.flops import flops_per_token, guided_share
from nativerank.layers.guided import guide_weight
from nativerank.methods import factorize
from nativerank.models import find_preset, hf_config, make_hf_config, materialize, skeleton

CONTEXT, SEQUENCES = 24, 2


def tiny_llama(**changes):
    values = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return make_hf_config({**values, **changes}, None)


def counted(model):
    """(forward, forward and backward) per token by PyTorch's counter; eager attention, as it cannot see CPU kernels."""
    model.set_attn_implementation("eager")
    ids = torch.zeros(SEQUENCES, CONTEXT, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids).logits.sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward / ids.numel(), counter.get_total_flops() / ids.numel()


MIXTURE = {
    "model_type": "mixtral",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN_MIXTURE = {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}


@pytest.mark.parametrize("method", ["spectron", "self-guided", None])
@pytest.mark.parametrize(
    "config",
    [
        hf_config(find_preset("pocket"), 96, CONTEXT),
        tiny_llama(),
        tiny_llama(tie_word_embeddings=True, head_dim=16),
        make_hf_config({"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}, None),
    ],
    ids=["pocket", "grouped", "tied", "gpt2"],
)
def test_the_sum_is_what_the_counter_sees(config, method):
    model = skeleton(config)
    if method:
        factorize(model, method, rank=5)
    flops = flops_per_token(model, CONTEXT)  # on the meta device
    assert (flops.forward, flops.training) == counted(materialize(model, seed=0, init_scale=0.5))


@pytest.mark.parametrize("method", ["spectron", None])
@pytest.mark.parametrize("changes", [{}, QWEN_MIXTURE], ids=["mixtral", "qwen"])
def test_experts_count_as_often_as_they_are_visited(changes, method):
    model = skeleton(make_hf_config(MIXTURE | changes, None))
    if method:
        factorize(model, method, rank=5)
    else:
        model.set_experts_implementation("eager")  # the counter does not know grouped products
    flops = flops_per_token(model, CONTEXT)
    forward, training = counted(materialize(model, seed=0, init_scale=0.5))
    # The router, d_model times the number of experts, is no hidden matrix and the only thing left out.
    router = 2 * 2 * 32 * 4
    assert (flops.forward + router, flops.training + 3 * router) == (forward, training)


def test_of_four_experts_two_are_visited():
    flops = flops_per_token(skeleton(make_hf_config(MIXTURE, None)), CONTEXT)
    attention_matrices, experts = 2 * (32 * 32 + 32 * 16), 3 * 32 * 48
    assert flops.matrices == 2 * 2 * (attention_matrices + 2 * experts)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("share", [0.5, 0.25, 1.0])
def test_a_guide_counts_as_often_as_it_is_computed(share, stochastic):
    steps = 400
    alphas = [guide_weight(step, round(share * steps)) for step in range(steps)]
    often = sum(alphas) / steps if stochastic else sum(alpha > 0 for alpha in alphas) / steps
    assert guided_share(share, stochastic) == pytest.approx(often, abs=1 / steps)
    guided, plain, dense = (skeleton(tiny_llama()) for _ in range(3))
    factorize(guided, "self-guided", rank=5)
    factorize(plain, rank=5)
    without = flops_per_token(plain, CONTEXT).matrices
    assert flops_per_token(guided, CONTEXT, guided=0.0).matrices == pytest.approx(without)
    expected = without + share * flops_per_token(dense, CONTEXT).matrices
    assert flops_per_token(guided, CONTEXT, guided=share).matrices == pytest.approx(expected)


def test_a_seventy_billion_model_is_counted_from_shapes():
    model = skeleton(hf_config(find_preset("llama3-70b")))
    flops = flops_per_token(model, 8192)
    non_embedding = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.ndim > 1)
    assert flops.matrices == 2 * non_embedding
    assert flops.head == 2 * 8192 * 128256 and flops.attention == 80 * 4 * 8192 * 8192
