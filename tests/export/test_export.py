"""What is written computes what was trained, or there is no folder."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM

from nativerank.export import export as module
from nativerank.export.export import export
from nativerank.export.parity import Batch, check, compare, logits_of, mean_kl
from nativerank.hub.load import load
from nativerank.hub.save import save
from nativerank.layers import factorize_modules, linear_modules
from nativerank.layers.base import factor_layers
from nativerank.models import hf_config, materialize, skeleton
from nativerank.train.trained import open_trained

IDS = torch.arange(40)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def near(found, wanted, bound=1e-5):
    return (found - wanted).abs().max() <= bound * wanted.abs().max()


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_dense_is_the_stock_architecture(run, tmp_path):
    done = export(run, tmp_path / "dense", "dense")
    assert done.form == "dense" and done.source == f"{run} at step 8"
    assert done.parity.measure == "max_logit" and 0 < done.parity.figure < 1e-5
    assert done.parity.source == "the validation data" and done.parity.tokens == 256
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    trained, stock = open_trained(run), AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(stock).__name__ == "LlamaForCausalLM" and not factor_layers(stock)
    assert near(logits(stock), logits(trained.model))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(left(tmp_path / "dense"))
    assert left(tmp_path) == ["dense"]
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "method `spectron`" in card and "LlamaForCausalLM.from_pretrained" in card and "| steps | 8 |" in card
    assert done.bytes == sum(file.stat().st_size for file in (tmp_path / "dense").iterdir())
    assert done.parameters["after"] == sum(p.numel() for p in stock.parameters())
    assert done.parameters["before"] == sum(p.numel() for p in trained.model.parameters()) < done.parameters["after"]


def test_the_merge_is_rounded_once(run, tmp_path):
    export(run, tmp_path / "dense", "dense")
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    for name, layer in factor_layers(open_trained(run).model).items():
        A, B = (X.detach().double() for X in layer.factors())
        assert torch.equal(stored[f"{name}.weight"], (A @ B.mT).float()), name


def test_factored_is_what_was_trained(run, tmp_path):
    done = export(run, tmp_path / "factored", "factored")
    assert (done.form, done.parity.figure, done.parity.mean_kl) == ("factored", 0.0, 0.0)
    assert not any(entry.merged for entry in done.matrices) and len(done.matrices) == 14
    assert torch.equal(logits(load(tmp_path / "factored")), logits(open_trained(run).model))


def mixed_model():
    """A LLaMA whose q, k, v are past break-even (16 of 32 x 32, 10.7 of 16 x 32) and the others not."""
    from nativerank.models import Preset

    preset = Preset("test", 32, 2, 2, 96, 300, 64, 2, 8, kv_heads=1)
    model = skeleton(hf_config(preset))
    ranks = {"*.q_proj": 16, "*.k_proj": 11, "*.v_proj": 10, "*.o_proj": 15, "*.mlp.*": 12}
    factorize_modules(model, overrides=ranks)
    return materialize(model, seed=0, init_scale=1.0).eval()


@pytest.mark.parametrize("format", ["factored", "dense"])
def test_auto_merges_what_reaches_break_even_and_nothing_else(tmp_path, format):
    model = mixed_model()
    wanted = logits(model)
    save(model, tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "mixed", format, merge="auto")
    assert done.form == "mixed" and done.parity.source == "random ids"
    assert {e.name.split(".")[-1] for e in done.matrices if e.merged} == {"q_proj", "k_proj"}
    assert [(e.rank, e.break_even) for e in done.matrices if e.name.endswith("0.self_attn.q_proj")] == [(16, 16.0)]
    found = load(tmp_path / "mixed")
    assert {name.split(".")[-1] for name in factor_layers(found)} == {
        *("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert {name.split(".")[-1] for name in linear_modules(found)} == {"q_proj", "k_proj"}
    assert near(logits(found), wanted)
    again = export(tmp_path / "mixed", tmp_path / "dense", "dense")
    assert again.form == "dense" and near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), wanted)


def test_auto_is_dense_where_everything_reaches_break_even(tmp_path, run_config):
    model = mixed_model()
    for layer in factor_layers(model).values():
        layer.resize(min(layer.in_features, layer.out_features))
    save(model, tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "dense", "factored", merge="auto")
    assert done.form == "dense" and all(entry.merged for entry in done.matrices)
    assert near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["factored", "dense"])
def test_half_precision_is_held_to_its_divergence(run, tmp_path, format, dtype):
    done = export(run, tmp_path / "half", format, dtype=dtype)
    assert done.parity.measure == "mean_kl" and 0 < done.parity.figure < 1e-4
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {str(value.dtype) for value in stored.values()} == {f"torch.{dtype}"}
    model = load(tmp_path / "half", dtype=getattr(torch, dtype))
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    assert mean_kl(logits(open_trained(run).model), logits(model)) < 1e-4


def test_shards(run, tmp_path):
    export(run, tmp_path / "dense", "dense", max_shard_size="20000")
    assert (tmp_path / "dense" / "model.safetensors.index.json").is_file()
    assert near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(open_trained(run).model))


def test_a_step_of_a_run(run, tmp_path):
    done = export(run, tmp_path / "dense", "dense", step=4)
    assert done.source == f"{run} at step 4"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert near(logits(stock), logits(open_trained(run, 4).model))
    assert not near(logits(stock), logits(open_trained(run).model))


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "mixtral"])
def test_other_architectures_get_their_own_modules_back(factored, tmp_path, model_type):
    """Conv1D with its orientation and bias, tied heads, stacks of experts."""
    folder = factored(model_type)
    done = export(folder, tmp_path / "dense", "dense")
    assert done.form == "dense" and done.parity.figure < 1e-5
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(stock).__module__.startswith("transformers.") and near(logits(stock), logits(load(folder)))


def test_experts_may_stay_half_factored(factored, tmp_path):
    """down (32 x 48) at rank 20 is past its break-even of 19.2, gate_up (96 x 32) at 20 is not (24)."""
    folder = factored("mixtral", value=20, include=["*experts*"])
    done = export(folder, tmp_path / "mixed", "factored", merge="auto")
    assert {e.name.split(".")[-1]: e.merged for e in done.matrices} == {"gate_up_proj": False, "down_proj": True}
    assert done.form == "mixed" and near(logits(load(tmp_path / "mixed")), logits(load(folder)))
    export(tmp_path / "mixed", tmp_path / "dense", "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert near(logits(stock), logits(load(folder))) and stock.config._experts_implementation != "nativerank"


def test_a_model_that_computes_something_else_leaves_no_folder(run, tmp_path, monkeypatch):
    write = module.save

    def damaged(model, *args, **options):
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
        return write(model, *args, **options)

    monkeypatch.setattr(module, "save", damaged)
    said = r"the dense folder in float32 does not compute what was trained: max \|logit difference\| \d\.\de-0\d of max"
    with pytest.raises(ValueError, match=said):
        export(run, tmp_path / "dense", "dense")
    assert left(tmp_path) == []


def test_a_number_that_is_none_is_no_parity(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "logits_of", lambda model, batch: logits_of(model, batch) * torch.nan)
    for format, dtype in (("dense", "float32"), ("dense", "bfloat16"), ("gguf", "float16")):
        with pytest.raises(
            ValueError, match=r"the logits of .* hold NaN, so there is nothing to hold an export against"
        ):
            export(run, tmp_path / "out", format, dtype=dtype)
    assert left(tmp_path) == []
    batch = Batch(IDS, "ids")
    for dtype in (torch.float32, torch.bfloat16):
        apart = compare(torch.ones(1, 40, 3), torch.full((1, 40, 3), torch.nan), dtype, batch)
        with pytest.raises(ValueError, match=r"the folder does not compute what was trained: .* nan "):
            check(apart, "the folder")


def test_a_full_disk_leaves_no_folder(run, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nativerank.hub.weights.save_file", full)
    with pytest.raises(ValueError, match=r"disk full while writing .*dense; nothing was kept"):
        export(run, tmp_path / "dense", "dense")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("format", "options", "said"),
    [
        ("onnx", {}, "--format is one of factored, dense, gguf, got 'onnx'"),
        ("dense", {"merge": "some"}, "--merge is one of none, auto, all, got 'some'"),
        ("dense", {"merge": "none"}, "--format dense goes with --merge all or auto, got none"),
        ("factored", {"merge": "all"}, "--format factored goes with --merge none or auto, got all"),
        ("gguf", {"merge": "auto"}, "--format gguf goes with --merge all, got auto"),
        ("dense", {"dtype": "int8"}, "--dtype of --format dense is one of float32, bfloat16, float16, got 'int8'"),
        ("gguf", {"dtype": "bfloat16"}, "--dtype of --format gguf is one of float32, float16, got 'bfloat16'"),
        ("dense", {"max_shard_size": "big"}, "max_shard_size 'big' is no number of bytes above 0"),
        ("dense", {"max_shard_size": "0"}, "max_shard_size '0' is no number of bytes above 0"),
        ("dense", {"max_shard_size": -5}, "max_shard_size -5 is no number of bytes above 0"),
        ("dense", {"step": 5}, "has no checkpoint of step 5; there are: 4, 8"),
    ],
)
def test_bad_requests(run, tmp_path, format, options, said):
    with pytest.raises(ValueError, match=said):
        export(run, tmp_path / "out", format, **options)
    assert left(tmp_path) == []


def test_bad_folders(run, tmp_path, run_config, listen):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="full exists and is not empty"):
        export(run, tmp_path / "full", "dense")
    for out, said in (("mine", "mine exists and is a file"), ("mine/out", "cannot make .*mine/out: Not a directory")):
        with pytest.raises(ValueError, match=said):
            export(run, tmp_path / "full" / out, "dense")
    assert left(tmp_path / "full") == ["mine"]
    with pytest.raises(ValueError, match="no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out", "dense")
    begun = shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("model", "checkpoints"))
    with pytest.raises(ValueError, match="begun has no complete checkpoint yet"):
        export(begun, tmp_path / "out", "dense")


def test_a_model_of_images_is_refused(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **small))
    factorize_modules(model, value=8)
    save(model, tmp_path / "vit")
    with pytest.raises(ValueError, match="is a ViTForImageClassification; export compares logits"):
        export(tmp_path / "vit", tmp_path / "out", "dense")


def test_the_figures_by_hand():
    wanted, found = torch.tensor([[[2.0, 0.0], [0.0, -4.0]]]), torch.tensor([[[2.0, 0.0], [0.0, -3.0]]])
    parity = compare(wanted, found, torch.float32, Batch(torch.zeros(1, 2, dtype=torch.long), "nothing"))
    assert (parity.figure, parity.bound, parity.tokens) == (0.25, 1e-4, 2)
    p, q = torch.softmax(wanted[0, 1].double(), 0), torch.softmax(found[0, 1].double(), 0)
    by_hand = (p * (p / q).log()).sum().item() / 2  # the other position agrees
    assert abs(parity.mean_kl - by_hand) < 1e-12
    assert compare(wanted, found, torch.bfloat16, Batch(torch.zeros(1, 2), "nothing")).figure == parity.mean_kl


def test_a_dense_model_has_no_factors_to_export(factored, tmp_path):
    save(load(factored("gpt2")), tmp_path / "dense", "dense")
    with pytest.raises(ValueError, match="dense has no factors; --format dense writes it"):
        export(tmp_path / "dense", tmp_path / "out", "factored")
    assert left(tmp_path) == ["dense"]


def test_tokenizers_that_are_gone_or_do_not_fit(run, tmp_path):
    source = shutil.copytree(run / "model", tmp_path / "model")
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*model/tokenizer_config.json: Expecting"):
        export(source, tmp_path / "out", "dense")
    large = Tokenizer(WordLevel({"a": 0, "b": 5000}, "a"))
    (source / "tokenizer.json").write_text(large.to_str())
    with pytest.raises(ValueError, match="with ids up to 5000, and the model knows only 300 tokens"):
        export(source, tmp_path / "out", "dense")
    (source / "tokenizer.json").unlink()
    said = []
    export(source, tmp_path / "out", "dense", complain=said.append)
    assert said == [f"{source} has no tokenizer, so {tmp_path / 'out'} gets none"]
    assert "generation_config.json" in left(tmp_path / "out") and "tokenizer_config.json" not in left(tmp_path / "out")
