"""A folder of a LLaMA language model runs where nativerank is not installed, and computes the same bits."""

import json
import os
import site
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import nativerank as nr
from nativerank.data.shards import Dataset

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=0)

# Python without site-packages' .pth files, through which an editable install is found.
STRANGER = """
import json, sys
try:
    import nativerank
except ImportError:
    pass
else:
    raise SystemExit("nativerank can be imported here")
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

def ask(folder, dtype):
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **trust).eval()
    base = AutoModel.from_pretrained(folder, dtype=dtype, **trust).eval()
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        found = {"logits": model(ids).logits, "hidden": base(ids).last_hidden_state}
    found["generated"] = model.generate(ids, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    save_file({name: t.float().contiguous() for name, t in found.items()}, folder + ".found.safetensors")
    said = {
        "config": type(config).__name__,
        "model": type(model).__name__,
        "base": type(base).__name__,
        "is base": type(model.model) is type(base),
        "backend": [type(m).is_backend_compatible() for m in (model, base)],
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "s": sorted({str(p.dtype) for n, p in model.named_parameters() if n.endswith(".s")}),
        "s after to": sorted({str(p.dtype) for n, p in model.bfloat16().named_parameters() if n.endswith(".s")}),
        "rest": sorted({str(p.dtype) for n, p in base.named_parameters() if not n.endswith(".s")}),
        "linears": all(type(m) is torch.nn.Linear for n, m in model.named_modules() if n.endswith((".up", ".down"))),
        "words": AutoTokenizer.from_pretrained(folder).tokenize("low rank"),
        "text": pipeline("text-generation", model=folder, **trust)("low rank", max_new_tokens=5)[0]["generated_text"],
    }
    json.dump(said, open(folder + ".said.json", "w"))

for pair in zip(sys.argv[1::2], sys.argv[2::2]):
    ask(*pair)
try:  # the folder of another architecture, which has no code of its own
    AutoModelForCausalLM.from_pretrained("qwen")
except ValueError as error:
    open("qwen.said", "w").write(str(error))
"""


def make(kinds, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()
    for include, method in kinds.items():
        nr.factorize(model, method, rank_ratio=0.25, include=[include])
    return model


CASES = {
    "lowrank": ({"*": "spectron"}, "float32", {}, "5GB"),
    "spectral, tied, biased, sharded": (
        {"*": "tsvd"},
        "float32",
        {"tie_word_embeddings": True, "attention_bias": True},
        "20KB",
    ),
    "both kinds beside dense, bf16, sharded": (
        {"*.self_attn.*": "spectron", "*.1.mlp.*": "sct"},
        "bfloat16",
        {},
        "20KB",
    ),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory, prepared):
    """The folder of each case, beside which lies what a process without nativerank says of it and computed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    root, words, folders = tmp_path_factory.mktemp("stranger"), [], {}
    for number, (name, (kinds, dtype, changes, shard)) in enumerate(CASES.items()):
        folder = folders[name] = root / f"m{number}"
        tokenizer = Dataset.open(prepared).tokenizer()
        model = make(kinds, **changes)
        nr.save(model, folder, tokenizer=tokenizer, dtype=getattr(torch, dtype), max_shard_size=shard)
        words += [str(folder), dtype]
    qwen = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    nr.factorize(qwen, rank_ratio=0.25)
    nr.save(qwen, root / "qwen")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")} | {
        "PYTHONPATH": os.pathsep.join(p for p in site.getsitepackages() if os.path.isdir(p)),
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys._base_executable, "-S", "-c", STRANGER, *words]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


@pytest.mark.parametrize("case", CASES)
def test_a_process_without_nativerank_computes_the_same(told, prepared, case):
    kinds, dtype, changes, _ = CASES[case]
    said = json.loads(told[case].with_name(told[case].name + ".said.json").read_text())
    found = load_file(told[case].with_name(told[case].name + ".found.safetensors"))
    ours, ids = nr.load(told[case], dtype=getattr(torch, dtype)), torch.arange(18).view(2, 9)
    with torch.no_grad():
        assert torch.equal(found["logits"], ours(ids).logits.float())
        assert torch.equal(found["hidden"], ours.model(ids).last_hidden_state.float())
        generated = ours.generate(ids, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    assert torch.equal(found["generated"], generated.float())
    spectral = any(method in ("sct", "tsvd") for method in kinds.values())
    assert said.pop("text").startswith("low rank")
    assert said == {
        "config": "NativerankConfig",
        "model": "NativerankLlamaForCausalLM",
        "base": "NativerankLlamaModel",
        "is base": True,
        "backend": [True, True],
        "tied": "tie_word_embeddings" in changes,
        "s": ["torch.float32"] * spectral,
        "s after to": ["torch.float32"] * spectral,
        "rest": [f"torch.{dtype}"],
        "linears": True,
        "words": Dataset.open(prepared).tokenizer().encode("low rank").tokens,
    }


def test_other_architectures_are_refused_there(told):
    """Instead of filling a stock model with fresh numbers, as they would be if the type were the architecture's."""
    said = next(iter(told.values())).with_name("qwen.said").read_text()
    assert "nativerank" in said and "does not recognize this architecture" in said


def test_the_file_goes_with_llama_language_models_alone(tmp_path):
    from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2ForCausalLM

    nr.save(make({"*": "spectron"}), tmp_path / "llama")
    assert (tmp_path / "llama/modeling_nativerank.py").read_text().startswith('"""LLaMA with matrices')
    config = json.loads((tmp_path / "llama/config.json").read_text())
    assert sorted(config["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    dense = make({})
    dense.config.auto_map = {"AutoModelForCausalLM": "theirs.Model"}  # of the folder that it was loaded from
    nr.save(dense, tmp_path / "dense")
    for name, model in (("base", LlamaModel(LlamaConfig(**SIZES))), ("qwen", Qwen2ForCausalLM(Qwen2Config(**SIZES)))):
        nr.factorize(model, rank_ratio=0.25)
        nr.save(model, tmp_path / name)
    for name in ("dense", "base", "qwen"):
        assert "auto_map" not in (tmp_path / name / "config.json").read_text()
        assert not (tmp_path / name / "modeling_nativerank.py").exists()


def test_the_config_of_a_loaded_model_does_not_promise_the_file(tmp_path):
    nr.save(make({"*": "spectron"}), tmp_path / "m")
    model = nr.load(tmp_path / "m")
    assert not hasattr(model.config, "auto_map")
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in (tmp_path / "again/config.json").read_text()
