"""A converted model: equal at full rank, as close as it says below, and what training goes on from."""

import errno
import json

import pytest
import torch
from torch.testing import assert_close

import nativerank as nr
from nativerank.config import RankConfig
from nativerank.convert import convert
from nativerank.data.shards import Dataset
from nativerank.evaluate.text import Text, reader_of, text_loss
from nativerank.layers import factorize as surgery
from nativerank.layers.base import factor_layers
from nativerank.layers.report import clipped, detailed, saving_warnings
from nativerank.models import make_hf_config

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, max_position_embeddings=64, eos_token_id=None, bos_token_id=None)
GPT2 = dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
FAMILIES = {
    "llama": ("llama", SIZES),
    "tied": ("llama", SIZES | dict(tie_word_embeddings=True)),
    "gpt2": ("gpt2", GPT2),
    "qwen2": ("qwen2", SIZES),
    "mixtral": ("mixtral", SIZES | dict(num_local_experts=4, num_experts_per_tok=2)),
}
KIND_OF = [(family, "lowrank") for family in FAMILIES] + [("llama", "spectral"), ("gpt2", "spectral")]
FULL = RankConfig(energy=1.0)


def stock(folder, family="llama", dtype=torch.float32, shard="5GB"):
    """A folder as transformers writes it, its weights no noise: their singular values fall off."""
    from transformers import AutoModelForCausalLM

    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_hf_config({"model_type": name, **sizes}, "test"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "wte" not in name:
                U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
                weight.copy_(U * (s * 0.9 ** torch.arange(len(s))) @ Vh)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory, prepared):
    """A stock folder with the tokenizer of `prepared`; nobody alters it."""
    folder = stock(tmp_path_factory.mktemp("stock") / "m")
    (folder / "tokenizer.json").write_bytes((prepared / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return folder


@torch.no_grad()
def logits(model):
    return model(torch.arange(40).view(2, 20)).logits


@pytest.mark.parametrize("family, kind", KIND_OF)
def test_full_rank_gives_the_logits_of_the_dense_model(tmp_path, family, kind):
    source = stock(tmp_path / "dense", family, torch.bfloat16, "20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    done = convert(source, tmp_path / "m", FULL, kind=kind)
    before, after = (logits(nr.load(folder)) for folder in (source, tmp_path / "m"))
    assert_close(after, before, rtol=0, atol=1e-4 * before.abs().max().item())
    names = [entry.name for entry in done.report.entries]
    assert list(factor_layers(nr.load(tmp_path / "m"))) == names
    tied = nr.load(tmp_path / "m")
    shared = tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    assert shared == (family in ("tied", "gpt2"))


@pytest.mark.parametrize("family, kind", KIND_OF)
def test_the_kept_energy_is_what_is_left_of_the_weight(tmp_path, family, kind):
    source = stock(tmp_path / "dense", family)
    done = convert(source, tmp_path / "m", RankConfig(energy=0.8), kind=kind)
    matrices = surgery.linear_modules(nr.load(source))
    layers = factor_layers(nr.load(tmp_path / "m"))
    assert {entry.name for entry in done.report.entries} == set(matrices) == set(layers)
    for entry in done.report.entries:
        W, W_r = matrices[entry.name].weight.double(), layers[entry.name].to_dense().double()
        assert_close(1 - entry.kept_energy, ((W - W_r).square().sum() / W.square().sum()).item(), atol=1e-6, rtol=1e-5)
        assert layers[entry.name].rank == entry.rank and entry.kept_energy >= 0.8
        assert entry.params_after == sum(factor.numel() for factor in layers[entry.name].factors())
        smaller = nr.linalg.singular_values(W).square()[..., : entry.rank - 1].sum() / W.square().sum()
        assert entry.rank == 1 or smaller < 0.8, "one less would not do"


def test_each_matrix_is_decomposed_once(dense, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(surgery, "decompose", lambda W: seen.append(W.shape) or decompose(W))
    from nativerank.linalg.truncate import decompose

    done = convert(dense, tmp_path / "m", RankConfig(energy=0.9))
    assert len(seen) == len(done.report.entries) == 14


@pytest.mark.parametrize("form", ["text", "prepared"])
def test_the_losses_are_those_of_both_models(dense, prepared, tmp_path, form):
    data = prepared if form == "prepared" else tmp_path / "a.txt"
    if form == "text":
        data.write_text("the low rank matrix model learns language from text " * 30)
    done = convert(dense, tmp_path / "m", RankConfig(value=4), data=data, eval_tokens=None)
    if form == "prepared":
        split = Dataset.open(prepared).split("val")
    else:
        from nativerank.data.prepare import prepare

        prepare([str(data)], tmp_path / "again", str(dense / "tokenizer.json"), 0.0, workers=1, quiet=True)
        split = Dataset.open(tmp_path / "again").split("train")
    text = Text(split, 0, full_last=data.is_file())
    assert done.before == text_loss(reader_of(nr.load(dense), None, "dense"), text)
    assert done.after == text_loss(reader_of(nr.load(tmp_path / "m"), None, "m"), text)
    assert done.before.tokens == split.tokens - 1 and done.before.nats != done.after.nats
    part = convert(dense, tmp_path / "part", RankConfig(value=4), data=data, eval_tokens=100)
    assert 0 < part.before.tokens < 130


@pytest.mark.parametrize("kind, method", [("lowrank", "spectron"), ("lowrank", "lowrank-adamw"), ("spectral", "sct")])
def test_training_goes_on_from_the_converted_loss(dense, prepared, tmp_path, cli, kind, method):
    done = convert(dense, tmp_path / "m", RankConfig(energy=0.8), kind=kind, data=prepared, eval_tokens=None)
    words = f"--train.steps 1 --train.context 64 --train.batch_size 2 --method {method}"
    words += " --optim.lr 1e-12 --optim.aux_lr 1e-12" + " --optim.s_lr 1e-12" * (kind == "spectral")
    run = cli("train", "--init", tmp_path / "m", "--data.path", prepared, "--out", tmp_path / "run", *words.split())
    assert run.code == 0, run.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (val_loss,) = [row["val_loss"] for row in rows if row.get("event") == "end"]
    assert_close(val_loss, done.after.nats, rtol=0, atol=1e-6)
    ranks = {name: layer.rank for name, layer in factor_layers(nr.load(tmp_path / "run")).items()}
    assert ranks == done.report.ranks


def test_mlp_only_leaves_everything_else_as_it_is(dense, tmp_path):
    done = convert(dense, tmp_path / "m", RankConfig(ratio=0.25, include=["*.mlp.*"]))
    assert all(".mlp." in entry.name for entry in done.report.entries) and len(done.report.entries) == 6
    before, after = (dict(nr.load(folder).named_parameters()) for folder in (dense, tmp_path / "m"))
    kept = [name for name in before if ".mlp." not in name]
    assert len(kept) > 8 and all(torch.equal(before[name], after[name]) for name in kept)


def test_a_value_caps_an_energy_and_overrides_win(dense, tmp_path):
    free = convert(dense, tmp_path / "free", RankConfig(energy=0.8)).report.ranks
    cap = sorted(free.values())[len(free) // 2]
    rank = RankConfig(energy=0.8, value=cap, overrides={"layers.0.*.q_proj": 2})
    capped = convert(dense, tmp_path / "capped", rank).report.ranks
    expected = {name: min(rank, cap) for name, rank in free.items()} | {"model.layers.0.self_attn.q_proj": 2}
    assert capped == expected and len(set(capped.values())) > 2


def test_the_dense_model_of_a_run_is_taken_too(cli, flags, tmp_path):
    assert cli("train", *flags(out=tmp_path / "run", method="dense-muon")).code == 0
    done = convert(tmp_path / "run", tmp_path / "m", FULL)
    assert_close(logits(nr.load(tmp_path / "m")), logits(nr.load(tmp_path / "run")), rtol=0, atol=1e-4)
    assert (tmp_path / "m/tokenizer.json").exists() and done.before is None


def test_tokenizer_files_are_copied_and_no_path_is_kept(dense, tmp_path):
    convert(dense, tmp_path / "m", RankConfig(value=3))
    written = {path.name for path in (tmp_path / "m").iterdir()}
    own = {"README.md", "config.json", "model.safetensors", "modeling_nativerank.py"}
    assert written == own | {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "m/tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert str(dense) not in (tmp_path / "m/config.json").read_text()


def test_a_full_disk_leaves_nothing(dense, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nativerank.hub.weights.write_tensors", full)
    with pytest.raises(ValueError, match="disk full while writing"):
        convert(dense, tmp_path / "m", RankConfig(value=3))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = nr.load(stock(tmp_path / "dense"))
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    nr.save(model, tmp_path / "nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN or infinity"):
        convert(tmp_path / "nan", tmp_path / "m", RankConfig(energy=0.9))
    assert not (tmp_path / "m").exists()


def test_the_table_fits_and_says_when_nothing_is_saved(dense, tmp_path):
    done = convert(dense, tmp_path / "m", RankConfig(ratio=0.25, overrides={"gate_proj": 32}))
    lines = detailed(done.report).splitlines()
    assert len(lines) == 9 and max(map(len, lines)) <= 80, "two blocks share rows"
    assert [line.split()[0] for line in lines if line.endswith("!")] == [clipped("model.layers.*.mlp.gate_proj", 20)]
    assert saving_warnings(done.report) == ["2 of 14 (marked !) are no smaller as factors than dense"]
    by_energy = convert(dense, tmp_path / "energy", RankConfig(energy=0.7)).report
    row = next(line for line in detailed(by_energy).splitlines() if "down_proj" in line).split()
    entries = [e for e in by_energy.entries if e.name.endswith("down_proj")]
    assert row[1:5] == ["2", "32", "x", "48"] and len(entries) == 2
    ranks, kept = sorted(e.rank for e in entries), sorted(e.kept_energy for e in entries)
    assert row[5] == (f"{ranks[0]}-{ranks[1]}" if ranks[0] < ranks[1] else f"{ranks[0]}")
    assert row[6] == f"{kept[0]:.2%}".rstrip("%") + f"-{kept[1]:.2%}"
    full = convert(dense, tmp_path / "full", FULL)
    assert "nothing is saved: factors" in saving_warnings(full.report)[1]


def test_fused_and_zero_matrices_are_pointed_out(tmp_path):
    model = nr.load(stock(tmp_path / "dense", "gpt2"))
    model.transformer.h[1].mlp.c_proj.weight.data.zero_()
    nr.save(model, tmp_path / "zero")
    done = convert(tmp_path / "zero", tmp_path / "m", RankConfig(energy=0.5))
    assert detailed(done.report).splitlines()[-1] == "fused: c_attn: q, k and v count as one matrix"
    (warning,) = saving_warnings(done.report)
    assert warning.startswith("transformer.h.1.mlp.c_proj: the weight is zero")
    assert done.report.ranks["transformer.h.1.mlp.c_proj"] == 1
