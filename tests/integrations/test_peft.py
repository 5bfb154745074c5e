"""PEFT on factors: adapters train while the factors stay, merge into them, and what is merged saves and loads."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import nativerank as nr
from nativerank.layers import guided_layers

LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
IDS = torch.arange(48).reshape(4, 12) % 64

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.1, **LLAMA))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1, **NO_ENDS)
    )


def factorized(build=llama, method="spectron", **options):
    torch.manual_seed(0)
    model = build()
    nr.factorize(model, method, rank=8, **options)
    return model


def adapted(base, targets=("up", "down")):
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False))


def train(model, steps=12):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("method", ["spectron", "stiefel-spectron"])
def test_adapters_train_merge_save_and_load(tmp_path, build, method):
    model = adapted(factorized(build, method))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1, losses
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trainable

    model.eval()
    expected = model(IDS).logits.detach()
    model.save_pretrained(tmp_path / "adapters")
    other = PeftModel.from_pretrained(factorized(build, method), tmp_path / "adapters").eval()
    assert torch.equal(other(IDS).logits, expected)

    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=1e-5)
    ranks = {layer.rank for layer in merged.modules() if hasattr(layer, "factors")}
    assert ranks == {8}  # the adapters went into the factors
    for form in ("factored", "dense"):
        nr.save(merged, tmp_path / form, format=form)
        again = nr.load(tmp_path / form)(IDS).logits
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_one_projection_can_be_named():
    model = adapted(factorized(), ["q_proj.up", "v_proj.down"])
    names = {name.split(".lora_")[0].split("layers.")[1] for name, p in model.named_parameters() if "lora_" in name}
    assert names == {f"{i}.self_attn.{part}" for i in (0, 1) for part in ("q_proj.up", "v_proj.down")}


def test_a_guide_mixes_with_the_adapted_branch():
    model = adapted(factorized(method="self-guided")).eval()
    layers = guided_layers(model).values()
    for layer in layers:
        layer.alpha = 0.0
    mixed = model(IDS).logits
    for layer in layers:
        layer.free_guide()
    torch.testing.assert_close(mixed, model(IDS).logits)


def test_our_optimizer_has_nothing_to_do_with_frozen_factors():
    with pytest.raises(ValueError, match="all of them are frozen"):
        nr.build_optimizer(adapted(factorized()), "spectron")


def test_adapters_are_not_lost_without_a_word(tmp_path):
    model = adapted(factorized())
    with pytest.raises(ValueError, match="merge_and_unload"):
        nr.save(model, tmp_path / "folder", format="dense")
    with pytest.raises(ValueError, match="merge_and_unload"):
        nr.save(model.get_base_model(), tmp_path / "folder")
    with pytest.raises(ValueError, match="merge_and_unload"):
        nr.to_dense_modules(model)
    assert not (tmp_path / "folder").exists()
