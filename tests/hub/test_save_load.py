"""What is saved comes back bit for bit; what does not fit is refused by name."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import nativerank as nr
from nativerank.hub.load import tokenizer_fingerprint
from nativerank.hub.weights import named_tensors
from nativerank.layers.base import factor_layers
from nativerank.models import make_hf_config

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=32)
FAMILIES = {
    "llama": SIZES,
    "tied": SIZES | dict(tie_word_embeddings=True),
    "qwen2": SIZES,
    "mixtral": SIZES | dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0),
}


def make(family="llama", factorized=True):
    from transformers import AutoModelForCausalLM

    config = make_hf_config({"model_type": "llama" if family == "tied" else family, **FAMILIES[family]}, "test")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if factorized:
        nr.factorize(model, rank_ratio=0.25, overrides={"*.0.*": 5})
    return model


@torch.no_grad()
def logits(model):
    return model(torch.arange(18).view(2, 9)).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A factored LLaMA; whoever alters it copies it first."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    nr.save(make(), folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factorized", [True, False])
def test_round_trip(tmp_path, family, factorized):
    model = make(family, factorized)
    assert nr.save(model, tmp_path / "m") == tmp_path / "m"
    again = nr.load(tmp_path / "m")
    assert torch.equal(logits(model), logits(again)) and not again.training
    assert {n: m.rank for n, m in factor_layers(model).items()} == {n: m.rank for n, m in factor_layers(again).items()}
    a, b = named_tensors(model), named_tensors(again)
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    files = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    files += ["modeling_nativerank.py"] * (factorized and family in ("llama", "tied"))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == files


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_form_is_read_by_plain_transformers(tmp_path, family):
    from transformers import AutoModelForCausalLM

    model = make(family)
    before = logits(model)
    nr.save(model, tmp_path / "m", format="dense")
    assert len(factor_layers(model)) and torch.equal(logits(model), before), "the model itself stays factored"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tolerance = 1e-5 * before.abs().max().item()  # merged in float64, run in float32
    torch.testing.assert_close(logits(stock), before, rtol=0, atol=tolerance)
    torch.testing.assert_close(logits(nr.load(tmp_path / "m")), before, rtol=0, atol=tolerance)
    assert "nativerank" not in (tmp_path / "m/config.json").read_text()


def test_every_tensor_is_stored_once_and_by_its_own_name(saved):
    tensors = load_file(saved / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.up.weight" in tensors
    assert tensors["model.layers.0.self_attn.q_proj.down.weight"].shape == (5, 32)
    assert set(tensors) == set(named_tensors(make()))


def alter(saved, tmp_path, change):
    folder = tmp_path / "altered"
    shutil.copytree(saved, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


NAME = "model.layers.1.mlp.up_proj.down.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME), f"lacks {NAME}"),
        (lambda t: (t.pop(NAME), t.pop("model.norm.weight")), f"lacks {NAME} and 1 more"),
        (lambda t: t.update(extra=torch.ones(2)), "holds extra, which the model does not have"),
        (lambda t: t.update({NAME: torch.ones(3, 3)}), rf"{NAME} has shape \(3, 3\), expected \(8, 32\)"),
        (lambda t: t.clear() or t.update(x=torch.ones(1)), "lacks .* and .* more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        nr.load(alter(saved, tmp_path, change))


@pytest.mark.parametrize("size", [0, 7, 1000, -10])
def test_a_truncated_file_is_refused(saved, tmp_path, size):
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors"):
        nr.load(folder)


def test_a_folder_without_weights_or_config_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        nr.load(tmp_path / "nowhere")
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors"):
        nr.load(folder)


def test_a_pickle_in_the_place_of_weights_does_not_run(saved, tmp_path):
    import os

    class RunsCode:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code-ran"),)

    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    torch.save(RunsCode(), folder / "model.safetensors")
    torch.save(RunsCode(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot read"):
        nr.load(folder)
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_type", "spiral", "spiral"),
        ("model_type", None, "does not name its architecture"),
        ("architecture", "SpiralForCausalLM", "unknown architecture 'SpiralForCausalLM': transformers .* has no such"),
        ("architecture", "AutoTokenizer", "unknown architecture 'AutoTokenizer'"),
        ("architecture", "MixtralForCausalLM", "a MixtralForCausalLM is not built from a llama config"),
        ("architecture", "LlamaModel", "does not fit the model: .*matches none"),
        ("factors", {"spiral": {"model.layers.0.mlp.up_proj": 3}}, "does not fit the model: unknown kind='spiral'"),
        ("factors", {"lowrank": {"nope": 3}}, "does not fit the model: .*'nope' matches none"),
        ("factors", {"lowrank": {"model.layers.0.mlp.up_proj": 33}}, r"does not fit the model: .*33"),
        ("factors", {"lowrank": {"model.layers.0.mlp.up_proj": "5"}}, "does not say which modules are factorized"),
        ("factors", {"lowrank": {}}, "does not say which modules are factorized"),
        ("factors", {}, "lacks model.layers.0.mlp.down_proj.weight and 13 more"),
        ("factors", None, "does not say which modules are factorized"),
        ("factors", {"guided": {"model.layers.0.mlp.up_proj": 5}}, "mlp.up_proj still had its guide"),
    ],
)
def test_a_config_that_does_not_hold_together_is_refused(saved, tmp_path, key, value, said):
    config = json.loads((saved / "config.json").read_text())
    config["nativerank"][key] = value
    with pytest.raises(ValueError, match=said):
        nr.load(with_config(saved, tmp_path, config))


def with_config(saved, tmp_path, config):
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_configs_of_other_versions_and_writers_are_refused(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    del config["nativerank"]
    with pytest.raises(ValueError, match="does not name its architecture"):
        nr.load(with_config(saved, tmp_path / "b", config))
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.mlp\.down_proj\.weight"):
        nr.load(with_config(saved, tmp_path / "c", config | {"model_type": "llama"}))


def test_a_folder_that_holds_something_is_left_alone(saved, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is not empty"):
        nr.save(make(), tmp_path / "m")
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    nr.save(make(), tmp_path / "empty")
    with pytest.raises(ValueError, match="format must be factored or dense, got 'gguf'"):
        nr.save(make(), tmp_path / "x", format="gguf")


@pytest.mark.parametrize("replace", [False, True])
def test_a_full_disk_leaves_what_was_there(saved, tmp_path, monkeypatch, replace):
    folder = tmp_path / "m"
    if replace:
        shutil.copytree(saved, folder)
    before = sorted(p.name for p in tmp_path.rglob("*"))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nativerank.hub.weights.write_tensors", full)
    with pytest.raises(ValueError, match="disk full while writing"):
        nr.save(make(), folder, replace=replace)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    if replace:
        nr.load(folder)


def test_the_tokenizer_goes_along_and_keeps_its_fingerprint(tmp_path, prepared):
    from nativerank.data.shards import Dataset
    from nativerank.data.tokenizer import load_tokenizer

    data = Dataset.open(prepared)
    nr.save(make(), tmp_path / "m", tokenizer=data.tokenizer())
    assert tokenizer_fingerprint(tmp_path / "m") == data.tokenizer_sha256
    text = "the low rank of \U0001f600"
    assert load_tokenizer(tmp_path / "m").encode(text).ids == data.tokenizer().encode(text).ids
    nr.save(make(), tmp_path / "bare")
    assert tokenizer_fingerprint(tmp_path / "bare") is None


def test_half_precision_comes_back_as_float32(tmp_path):
    model = make().to(torch.bfloat16)
    nr.save(model, tmp_path / "m")
    again = nr.load(tmp_path / "m")
    name = "model.layers.0.self_attn.q_proj.up.weight"
    assert load_file(tmp_path / "m/model.safetensors")[name].dtype == torch.bfloat16
    assert again.get_parameter(name).dtype == torch.float32
    assert torch.equal(again.get_parameter(name), model.get_parameter(name).float())
