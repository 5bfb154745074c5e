"""From stock folders into factors and back: converted, trained on, saved, merged into a stock folder again."""

import json

import pytest
import torch
from torch.testing import assert_close

import nativerank as nr
from nativerank.config import RankConfig
from nativerank.convert import convert
from nativerank.layers.base import factor_layers
from nativerank.models import make_hf_config, materialize, skeleton

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, max_position_embeddings=64, eos_token_id=None, bos_token_id=None)
GPT2 = dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
FAMILIES = {
    "llama": SIZES,
    "llama, tied": SIZES | dict(tie_word_embeddings=True),
    "gpt2": GPT2 | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "qwen2": SIZES,
    "qwen3": SIZES | dict(head_dim=16),
    "mixtral": SIZES | dict(num_local_experts=4, num_experts_per_tok=2),
}
KIND_OF = [(family, "lowrank") for family in FAMILIES] + [("llama", "spectral"), ("gpt2", "spectral")]


def written(folder, family, prepared):
    config = make_hf_config({"model_type": family.split(",")[0], **FAMILIES[family]}, "test")
    materialize(skeleton(config), seed=0, init_scale=1.0).bfloat16().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "tokenizer.json").write_bytes((prepared / "tokenizer.json").read_bytes())
    return folder


@torch.no_grad()
def logits(model):
    return model(torch.arange(40).view(2, 20)).logits


def agree(found, wanted):
    assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("family, kind", KIND_OF)
def test_at_full_rank_the_stock_folder_comes_back(tmp_path, prepared, family, kind):
    from transformers import AutoModelForCausalLM

    source = written(tmp_path / "stock", family, prepared)
    convert(source, tmp_path / "factored", RankConfig(energy=1.0), kind=kind)
    factored = nr.load(tmp_path / "factored")
    nr.save(factored, tmp_path / "dense", "dense")
    again, wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), nr.load(source)
    assert type(again) is type(wanted) and not factor_layers(again)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in wanted.named_parameters()}
    agree(logits(again), logits(wanted))
    agree(logits(nr.load(tmp_path / "dense")), logits(wanted))


@pytest.mark.parametrize("family, kind", KIND_OF)
def test_trained_on_it_can_be_saved_merged_and_converted_again(tmp_path, prepared, cli, family, kind):
    source = written(tmp_path / "stock", family, prepared)
    done = convert(source, tmp_path / "factored", RankConfig(energy=0.8), kind=kind)
    assert all(entry.kept_energy >= 0.8 for entry in done.report.entries)
    words = "--train.steps 3 --train.context 32 --train.batch_size 2 --train.eval_every 0 --device cpu --method "
    words += {"lowrank": "spectron", "spectral": "sct"}[kind]
    run = cli(
        "train", "--init", tmp_path / "factored", "--data.path", prepared, "--out", tmp_path / "run", *words.split()
    )
    assert run.code == 0, run.err

    trained = nr.load(tmp_path / "run")
    ranks = {name: layer.rank for name, layer in factor_layers(trained).items()}
    assert ranks == done.report.ranks
    assert (logits(trained) - logits(nr.load(tmp_path / "factored"))).abs().max() > 1e-3, "it was trained"
    nr.save(trained, tmp_path / "copy")
    assert torch.equal(logits(nr.load(tmp_path / "copy")), logits(trained))
    nr.save(trained, tmp_path / "dense", "dense")
    dense = nr.load(tmp_path / "dense")
    agree(logits(dense), logits(trained))
    back = convert(tmp_path / "dense", tmp_path / "back", RankConfig(ratio=0.25, overrides=ranks), kind=kind)
    assert all(entry.kept_energy > 1 - 1e-6 for entry in back.report.entries), "merged, it still has these ranks"
    agree(logits(nr.load(tmp_path / "back")), logits(trained))


@pytest.mark.parametrize("family", ["llama, tied", "gpt2", "mixtral"])
def test_the_stock_folder_teaches_its_factors(tmp_path, prepared, cli, family):
    source = written(tmp_path / "stock", family, prepared)
    convert(source, tmp_path / "factored", RankConfig(ratio=0.25))
    words = (
        "--train.steps 30 --train.context 32 --train.batch_size 4 --train.eval_every 0 --device cpu --method spectron"
    )
    words += f" --distill.teacher {source} --distill.weight 1 --optim.lr 0.02 --optim.aux_lr 0.001"
    run = cli(
        "train", "--init", tmp_path / "factored", "--data.path", prepared, "--out", tmp_path / "run", *words.split()
    )
    assert run.code == 0, run.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    distances = [row["distill_loss"] for row in rows if "distill_loss" in row]
    assert sum(distances[-3:]) < 0.7 * sum(distances[:3])
