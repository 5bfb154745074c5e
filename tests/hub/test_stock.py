"""Folders that others wrote: read whole, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import nativerank as nr
from nativerank.models import make_hf_config

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A sharded stock folder in bfloat16."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_hf_config({"model_type": "llama", **SIZES}, "test"))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    return tmp_path / "m"


def shard_of(folder, name):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def alter(folder, change):
    file = shard_of(folder, NAME)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_shards_and_half_precision_come_back_in_float32_and_silence(folder, capfd):
    model = nr.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert torch.equal(model.get_parameter(NAME), load_file(shard_of(folder, NAME))[NAME].float())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME), f"lacks {NAME}"),
        (lambda t: t.update(extra=torch.ones(2)), "holds extra, which the model does not have"),
        (lambda t: t.update({NAME: torch.ones(3)}), rf"{NAME} has shape \(3,\), expected \(48, 32\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, said, capfd):
    alter(folder, change)
    with pytest.raises(ValueError, match=said):
        nr.load(folder)
    assert capfd.readouterr() == ("", "")


def test_gpt2_as_it_was_published(tmp_path):
    """No prefix before the names, masks as buffers."""
    sizes = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(make_hf_config({"model_type": "gpt2", **sizes}, "test")).eval()
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    for block in range(2):
        old[f"h.{block}.attn.bias"] = torch.ones(1, 1, 32, 32)
        old[f"h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(18).view(2, 9)
    assert torch.equal(nr.load(tmp_path / "m")(ids).logits, model(ids).logits)


def test_damage_and_a_shard_that_is_gone(folder):
    file = shard_of(folder, NAME)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot read the weights in"):
        nr.load(folder)
    file.unlink()
    with pytest.raises(ValueError, match=f"cannot read the weights in .*{file.name}"):
        nr.load(folder)


@pytest.mark.parametrize(
    "keys",
    [
        {"attn_implementation": "kernels-community/x"},
        {"_attn_implementation": "flash_attention_2"},  # not installed, it is fetched too
        {"attn_implementation": {"": "sdpa", "text_config": "paged|kernels-community/x"}},
        {"vision_config": {"layers": [{"_attn_implementation_internal": "kernels-community/x"}]}},
        {"experts_implementation": "owner/experts"},
    ],
)
def test_kernels_from_elsewhere_are_refused(folder, keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "eager"}))
    assert nr.load(folder).config._attn_implementation == "eager"
    (folder / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(ValueError, match=r"implementation(_internal)? is '.*', which is none of eager, sdpa, "):
        nr.load(folder)
    factored = {"model_type": "nativerank", "nativerank": {"architecture": "LlamaForCausalLM", "model_type": "llama"}}
    factored["nativerank"]["factors"] = {"lowrank": {NAME.removesuffix(".weight"): 4}}
    (folder / "config.json").write_text(json.dumps(config | keys | factored))
    with pytest.raises(ValueError, match="which is none of eager, sdpa, "):
        nr.load(folder)


def test_adapters_beside_the_weights_are_not_taken_up_without_a_word(folder):
    from transformers import AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(peft.LoraConfig(target_modules=["up_proj"], r=2))
    for format in ("factored", "dense"):
        with pytest.raises(ValueError, match=r"up_proj has an adapter; call merge_and_unload\(\)"):
            nr.save(model, folder.with_name("new"), format)
    model.save_pretrained(folder)  # the adapters alone
    with pytest.raises(ValueError, match=r"m holds adapters \(adapter_config\.json\); load its base model, or merge"):
        nr.load(folder)
    (folder / "adapter_config.json").unlink()
    assert not hasattr(nr.load(folder), "peft_config")


def test_pickles_and_quantized_weights_are_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="holds quantized weights"):
        nr.load(folder)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/config.json").write_text(json.dumps(config))
    torch.save({NAME: torch.ones(3)}, tmp_path / "p/pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot read the weights in"):
        nr.load(tmp_path / "p")
