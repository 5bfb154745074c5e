"""A run to export, and folders of other architectures."""

import pytest
import torch

from nativerank.hub.save import save
from nativerank.layers import factorize_modules
from nativerank.models import materialize, read_hf_config, skeleton
from nativerank.train.loop import train

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = SMALL | {"intermediate_size": 48, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
OTHERS = {
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "qwen2": SMALL | {"intermediate_size": 48, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "mixtral": EXPERTS | {"max_position_embeddings": 64},
}


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def run(made, tmp_path_factory, run_config, listen):
    """A finished run with checkpoints at 4 and 8, rank 8 in every matrix."""
    if "run" not in made:
        made["run"] = tmp_path_factory.mktemp("runs") / "run"
        train(run_config(out=made["run"], train__checkpoint_every=4, train__eval_every=0, rank__value=8), listen())
    return made["run"]


@pytest.fixture
def factored(made, tmp_path_factory, write_hf_config):
    """factored(model_type, **how): a factored folder of another architecture, with random biases."""

    def make(model_type, **how):
        key = model_type, str(how)
        if key not in made:
            config = read_hf_config(write_hf_config(model_type=model_type, **OTHERS[model_type]))
            model = skeleton(config)
            factorize_modules(model, **{"value": 8} | how)
            materialize(model, seed=0, init_scale=1.0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_()
            made[key] = save(model, tmp_path_factory.mktemp("factored") / model_type)
        return made[key]

    return make
