"""After nr.register() the Auto classes and pipelines of transformers read factored folders, strictly."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import nativerank as nr
from nativerank.data.shards import Dataset

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(bos_token_id=0, eos_token_id=0, max_position_embeddings=32)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
VISION |= dict(image_size=16, patch_size=4)
TEXT = {"input_ids": torch.arange(10).view(1, 10)}
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def llava():
    vision = transformers.CLIPVisionConfig(**VISION, projection_dim=16)
    text = transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    return transformers.LlavaForConditionalGeneration(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


SEEN = {"input_ids": torch.tensor([[1, *[5] * 16, 2, 3]]), "pixel_values": PIXELS}
ARCHITECTURES = {
    "llama": (llama, "AutoModelForCausalLM", TEXT, {}),
    "vit": (vit, "AutoModelForImageClassification", {"pixel_values": PIXELS}, {"exclude": ["*embeddings*"]}),
    "llava": (llava, "AutoModelForImageTextToText", SEEN, {}),
    "bert": (bert, "AutoModelForMaskedLM", TEXT, {}),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    nr.register()
    nr.register()  # harmless


@pytest.fixture(scope="module")
def saved(tmp_path_factory, prepared):
    """A factored LLaMA with a tokenizer; whoever alters it copies it first."""
    torch.manual_seed(0)
    model, folder = llama(), tmp_path_factory.mktemp("registered") / "m"
    nr.factorize(model, "sct", rank_ratio=0.25)
    nr.save(model, folder, tokenizer=Dataset.open(prepared).tokenizer(), max_shard_size="20KB")
    return folder


@torch.no_grad()
def logits(model, inputs=TEXT):
    return model(**inputs).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_loads_by_its_auto_class_and_by_ours(name, tmp_path):
    make, auto, inputs, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = make().eval()
    nr.factorize(model, rank_ratio=0.25, **options)
    nr.save(model, tmp_path / "m")
    for again in (getattr(transformers, auto).from_pretrained(tmp_path / "m"), nr.load(tmp_path / "m")):
        assert type(again) is type(model) and not again.training
        assert torch.equal(logits(again, inputs), logits(model, inputs))
    base = AutoModel.from_pretrained(tmp_path / "m")
    assert type(base) is type(model.base_model)
    with pytest.raises(ValueError, match="AutoModelForSpeechSeq2Seq does not read a"):
        transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "m")
    nr.save(model, tmp_path / "dense", format="dense")
    stock = nr.load(tmp_path / "dense")
    assert type(stock) is type(model)
    torch.testing.assert_close(logits(stock, inputs), logits(model, inputs), rtol=0, atol=1e-5)


def test_what_comes_back_trains_with_our_optimizer(saved):
    model = AutoModelForCausalLM.from_pretrained(saved).train()
    optimizer = nr.build_optimizer(model, "sct")
    before = model(**TEXT, labels=TEXT["input_ids"]).loss
    for _ in range(5):
        optimizer.zero_grad()
        model(**TEXT, labels=TEXT["input_ids"]).loss.backward()
        optimizer.step()
    assert model(**TEXT, labels=TEXT["input_ids"]).loss < before


def test_pipeline_and_tokenizer(saved, prepared):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer("the low rank")["input_ids"] == Dataset.open(prepared).tokenizer().encode("the low rank").ids
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == Dataset.open(prepared).eot_id
    assert tokenizer.model_max_length == 32 and tokenizer.pad_token is None
    pipe = transformers.pipeline("text-generation", model=str(saved))
    (said,) = pipe("the low rank", max_new_tokens=4, do_sample=False)
    assert said["generated_text"].startswith("the low rank") and torch.equal(logits(pipe.model), logits(nr.load(saved)))


def test_options_are_honoured_or_refused(saved):
    half = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, attn_implementation="eager")
    layer = half.model.layers[0].mlp.up_proj
    assert half.dtype == torch.bfloat16 and layer.s.dtype == torch.float32
    assert half.config._attn_implementation == "eager"
    model, info = AutoModelForCausalLM.from_pretrained(saved, device_map="cpu", output_loading_info=True)
    assert model.dtype == torch.float32 and not any(info.values())
    config = AutoConfig.from_pretrained(saved)
    assert config.model_type == "nativerank" and config.hidden_size == 32
    config.attention_dropout = 0.5
    assert AutoModelForCausalLM.from_pretrained(saved, config=config).config.attention_dropout == 0.5
    changed = AutoModelForCausalLM.from_pretrained(saved.parent, subfolder=saved.name, use_cache=False)
    assert changed.config.use_cache is False and torch.equal(logits(changed), logits(nr.load(saved)))
    for options, said in [
        ({"device_map": {"model": 0, "lm_head": 1}}, "device_map is a device or 'auto'"),
        ({"device_map": "sideways"}, "device_map is a device or 'auto' .* got 'sideways'"),
        ({"dtype": torch.int8}, r"dtype is one of .* got torch\.int8"),
        ({"tp_plan": "auto"}, "tp_plan is no option for a factored folder, and no key of its config"),
    ]:
        with pytest.raises(ValueError, match=said):
            AutoModelForCausalLM.from_pretrained(saved, **options)
    with pytest.raises(ValueError, match=r"made by nativerank\.factorize"):
        AutoModelForCausalLM.from_config(config)


def test_it_is_as_strict_as_we_are(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "m")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}, which its index names; was it copied whole"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=f"lacks {shard.name}"):  # and does not fall back on a stock class
        transformers.pipeline("text-generation", model=str(tmp_path / "m"))


def test_a_folder_in_the_cache_of_the_hub(saved, tmp_path):
    """As it lies there after a download; nothing is downloaded here."""
    place = tmp_path / "models--me--small"
    shutil.copytree(saved, place / "snapshots/abc")
    (place / "refs").mkdir()
    (place / "refs/main").write_text("abc")
    here = {"local_files_only": True}  # transformers forgets it in its search for an adapter, if peft is installed
    found = AutoModelForCausalLM.from_pretrained("me/small", cache_dir=tmp_path, **here, adapter_kwargs=here)
    assert torch.equal(logits(found), logits(nr.load(saved)))


def test_the_functions_alone_read_no_model_of_transformers():
    code = """
import sys
import nativerank
nativerank.load, nativerank.save, nativerank.factorize, nativerank.build_optimizer
models = sorted(m for m in sys.modules if m.startswith("transformers.models."))
assert not models, models[:3]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_trap_that_save_pretrained_was(tmp_path):
    """Stock saving of a factorized model: what transformers would have read as fresh dense weights reads as it was."""
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True).eval()
    nr.factorize(model, rank_ratio=0.25)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "nativerank"
    for again in (nr.load(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m")):
        assert torch.equal(logits(again), logits(model)) and again.lm_head.weight is again.model.embed_tokens.weight
    base = AutoModel.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(base(**TEXT).last_hidden_state, model.model(**TEXT).last_hidden_state)
