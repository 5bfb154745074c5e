"""Tiny models of every family the surgery must know, and a token batch for them."""

import pytest
import torch

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=32)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)


def tiny_config(family: str, **changes):
    import transformers as t

    configs = {
        "llama": lambda: t.LlamaConfig(**{**SIZES, **HEADS, **changes}),
        "qwen2": lambda: t.Qwen2Config(**{**SIZES, **HEADS, **changes}),  # q, k, v with bias
        "mistral": lambda: t.MistralConfig(**{**SIZES, **HEADS, **changes}),
        "gpt2": lambda: t.GPT2Config(
            **{**dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32), **changes}
        ),
        "mixtral": lambda: t.MixtralConfig(
            **{**SIZES, **HEADS, **dict(num_local_experts=4, num_experts_per_tok=2), **changes}
        ),
    }
    return configs[family]()


@pytest.fixture
def build():
    """build(family, **config changes): a small randomly initialised causal LM in evaluation mode."""
    from transformers import AutoModelForCausalLM

    def make(family: str, **changes):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()

    return make


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
