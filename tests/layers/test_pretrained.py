"""save_pretrained of a factorized model belongs to that model, travels with its copies, and leaves with the factors."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from nativerank.hub.load import load
from nativerank.layers import factorize_modules, to_dense_modules
from nativerank.layers.pretrained import factored_config

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2)


def make(**options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    factorize_modules(model, ratio=0.25, **options)
    return model


def same(a, b):
    return torch.equal(a(torch.arange(9)[None]).logits, b(torch.arange(9)[None]).logits)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
def test_a_copy_saves_itself(travel, tmp_path):
    model = make()
    twin = travel(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    del model
    twin.save_pretrained(tmp_path / "twin")
    assert not load(tmp_path / "twin").lm_head.weight.any()
    twin.model.save_pretrained(tmp_path / "base")  # the base model is a Hugging Face model too
    assert type(load(tmp_path / "base")).__name__ == "LlamaModel"


def test_a_model_is_freed_with_its_last_name():
    model = make()
    gc.collect()
    gc.disable()
    try:
        weight = weakref.ref(model.lm_head)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_it_leaves_with_the_factors(tmp_path):
    model = make()
    to_dense_modules(model)
    assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.model)
    model.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "llama"
    assert same(LlamaForCausalLM.from_pretrained(tmp_path / "m"), model)


def test_mixed_kinds(tmp_path):
    model = make(include="*.self_attn.*")
    factorize_modules(model, kind="spectral", value=5, include="*.1.mlp.*")
    config = factored_config(model)["nativerank"]["factors"]
    assert sorted(config) == ["lowrank", "spectral"] and set(config["spectral"].values()) == {5}
    model.save_pretrained(tmp_path / "m")
    assert same(load(tmp_path / "m"), model)


def test_what_trainers_pass(tmp_path):
    model = make()
    state = {name: value * 2 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "m", state_dict=state, max_shard_size="20KB", is_main_process=True)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert torch.equal(load(tmp_path / "m").lm_head.weight, 2 * model.lm_head.weight)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").iterdir())
    with pytest.raises(ValueError, match=r"call model\.push_to_hub"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)


def test_experts_keep_the_names_of_their_modules(tmp_path):
    """Stock saving would turn the stacks of a mixture of experts back into one matrix per expert."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()
    factorize_modules(model, ratio=0.25, exclude="*.self_attn.*")
    model.save_pretrained(tmp_path / "m")
    assert same(load(tmp_path / "m"), model)


def test_a_save_that_is_cut_short_is_not_read_as_a_stock_folder(tmp_path, monkeypatch):
    from transformers import modeling_utils

    def cut(*args, **options):
        raise OSError("the disk is full")

    model = make()
    before = model.config.to_dict()
    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "safe_save_file", cut)
        with pytest.raises(OSError, match="disk is full"):
            model.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "nativerank"
    assert "save_pretrained" not in vars(model.config) and model.config.to_dict().keys() == before.keys()
    model.save_pretrained(tmp_path / "m")
    assert same(load(tmp_path / "m"), model)


def test_guides_are_saved_for_whoever_goes_on_and_refused_by_load(tmp_path):
    model = make(kind="guided")
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="still had its guide"):
        load(tmp_path / "m")
    for layer in model.modules():
        if hasattr(layer, "free_guide"):
            layer.free_guide()
    model.save_pretrained(tmp_path / "n")
    assert same(load(tmp_path / "n"), model)
