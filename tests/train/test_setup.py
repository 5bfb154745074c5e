"""From a configuration to a run: defaults filled in once, conflicts named, folders chosen."""

import subprocess

import pytest
import torch

from nativerank.config import DataConfig, ModelConfig, RankConfig, RunConfig, TrainConfig
from nativerank.distributed.grid import Grid
from nativerank.layers import LowRankLinear
from nativerank.train.compiled import CompiledForward, compile_blocks
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows
from nativerank.train.resolve import free_folder, resolve, tokens_per_step
from nativerank.train.setup import build, git_commit, open_data, precisions


def resolved(**changes):
    return resolve(RunConfig(**{"out": "x", "device": "cpu"} | changes))


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        ("spectron-s", {}, (8, 64)),
        ("spectron-s", {"batch_size": 2}, (2, 256)),
        ("spectron-s", {"batch_size": 512}, (512, 1)),
        ("spectron-s", {"accumulation": 1}, (8, 1)),
        ("spectron-s", {"batch_size": 3, "accumulation": 5}, (3, 5)),
        ("demo", {"batch_size": 4}, (4, 2)),
        ("demo", {"batch_size": 12}, (12, 1)),
    ],
)
def test_another_batch_size_keeps_the_sequences_of_a_step(preset, given, expected):
    for model in (ModelConfig(preset=preset), ModelConfig(preset=preset, config="c.json")):
        train = resolved(model=model, train=TrainConfig(context=8, **given)).train
        assert (train.batch_size, train.accumulation) == expected


@pytest.mark.parametrize(("preset", "batch_size"), [("spectron-s", 3), ("spectron-s", 1024), ("demo", 3)])
def test_a_batch_size_that_does_not_divide_them_is_refused(preset, batch_size):
    with pytest.raises(ValueError, match=rf"{batch_size} does not divide the preset's \d+ .*give --train.accumulation"):
        resolved(model=ModelConfig(preset=preset), train=TrainConfig(batch_size=batch_size))


def test_tokens_become_steps_rounded_up():
    train = resolved(model=ModelConfig(preset="pocket"), train=TrainConfig(tokens=1025)).train
    assert tokens_per_step(train) == 8 * 128 and train.steps == 2 and train.tokens is None


def test_ranks_come_from_the_flag_then_the_preset_then_a_quarter():
    assert resolved(model=ModelConfig(preset="pocket")).rank.value == 32
    assert resolved(model=ModelConfig(preset="pocket"), rank=RankConfig(ratio=0.5)).rank.value is None
    assert resolved(model=ModelConfig(config="c.json"), train=TrainConfig(context=8)).rank == RankConfig(ratio=0.25)
    assert resolved(method="dense-muon").rank == RankConfig()


def test_free_folders_count_on(tmp_path):
    assert free_folder("a", str(tmp_path)) == str(tmp_path / "a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert free_folder("a", str(tmp_path)) == str(tmp_path / "a-3")


def test_a_run_without_out_takes_the_first_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(RunConfig(model=ModelConfig(preset="pocket"))).out == "runs/pocket-spectron"
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs/pocket-spectron").mkdir(parents=True)
    assert resolve(RunConfig(model=ModelConfig(preset="pocket"))).out == "runs/pocket-spectron-2"


def test_runs_of_ones_own_architecture_are_named_after_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, name in (("mine/config.json", "mine"), ("small.json", "small"), ("mine", "mine")):
        config = resolved(model=ModelConfig(config=file), train=TrainConfig(context=8), out=None)
        assert config.out == f"runs/{name}-spectron"


def test_the_model_takes_context_and_vocabulary_of_the_data(prepared):
    config = resolved(
        model=ModelConfig(preset="pocket"), data=DataConfig(path=str(prepared)), train=TrainConfig(context=24)
    )
    built = build(config, open_data(config))
    assert built.model.config.vocab_size == 300 and built.model.config.max_position_embeddings == 24
    assert built.report is not None and set(built.report.ranks.values()) == {32}
    assert built.model.training


@pytest.mark.parametrize("method", ["spectron", "sct", "dense-adamw"])
def test_layers_that_read_one_input_make_one_product(run_config, method):
    config = resolve(run_config(out="x", method=method))
    for block in build(config, open_data(config)).model.model.layers:
        for part, names in ((block.self_attn, ("q_proj", "k_proj", "v_proj")), (block.mlp, ("gate_proj", "up_proj"))):
            layers = [getattr(part, name) for name in names]
            if method == "dense-adamw":
                assert not any(hasattr(layer, "shared") for layer in layers)
            else:
                assert layers[0].shared.layers == layers
        if method != "dense-adamw":
            assert block.self_attn.o_proj.shared is block.mlp.down_proj.shared is None


def test_the_end_of_text_of_the_data_is_the_models(prepared, run_config, tmp_path, listen):
    """As padding it would never be trained, though it is what every document begins with."""
    config = resolved(
        model=ModelConfig(preset="pocket"), data=DataConfig(path=str(prepared)), train=TrainConfig(context=24)
    )
    dataset = open_data(config)
    for given in (config, resolve(run_config(out="x"))):
        hf = build(given, dataset).model
        assert hf.config.eos_token_id == hf.config.bos_token_id == dataset.eot_id
        assert hf.config.pad_token_id is None and hf.get_input_embeddings().padding_idx is None


def test_options_reach_the_layers_and_the_optimizer(run_config):
    changes = dict(rank__overrides={"q_proj": 3}, rank__exclude=["down_proj"], optim__momentum=0.5)
    config = resolve(run_config(out="x", optim__nesterov=True, optim__weight_decay=0.1, **changes))
    built = build(config, open_data(config))
    layer = built.model.model.layers[0]
    assert layer.self_attn.q_proj.rank == 3 and isinstance(layer.mlp.down_proj, torch.nn.Linear)
    assert isinstance(layer.mlp.up_proj, LowRankLinear)
    group = built.optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, True, 0.1)
    assert any(p is layer.mlp.down_proj.weight for p in built.optimizer.param_groups[1]["params"])


def test_weights_can_come_from_another_run(tmp_path, run_config, listen):
    first = train(run_config(out=tmp_path / "a"), listen())
    listener = listen()
    second = train(run_config(out=tmp_path / "b", init=tmp_path / "a/model", train__seed=1), listener)
    assert listener.facts["factorized"] == 14
    assert listener.rows[0]["loss"] < first["val_loss"] + 0.5, "it starts where the first one ended"
    assert second["val_loss"] < first["val_loss"]


def test_the_commit_is_ours_or_unknown(tmp_path):
    """A package installed inside somebody's repository must not record that repository's commit."""
    assert git_commit(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").write_text("x")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/ours").write_text("x")
    for words in (["init", "-q"], ["add", "theirs"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *words], check=True)
    assert git_commit(tmp_path / "site-packages") == "unknown"
    assert len(git_commit(tmp_path / "theirs")) == 40


def test_compile_takes_the_repeated_blocks_only(run_config):
    config = resolve(run_config(out="x"))
    built = build(config, open_data(config))
    compile_blocks(built.model, print)
    compiled = [m for m in built.model.modules() if isinstance(vars(m).get("forward"), CompiledForward)]
    assert compiled == list(built.model.model.layers)


def test_a_short_context_still_ends_with_a_summary(tmp_path, run_config, listen):
    for context in (1, 8):
        out = tmp_path / str(context)
        summary = train(run_config(out=out, train__context=context, train__steps=2, train__batch_size=64), listen())
        assert summary["step"] == 2 and (summary["sample"] == "" or context >= 8)


def test_a_model_of_exactly_the_context_can_give_a_sample(tmp_path, run_config, write_hf_config, listen):
    config = write_hf_config(max_position_embeddings=16)
    summary = train(run_config(out=tmp_path / "a", model__config=config, train__context=16, train__steps=2), listen())
    assert summary["prompt"]


def test_other_architectures_train(tmp_path, run_config, write_hf_config, listen):
    families = {
        "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=32),
        "mixtral": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32),
    }  # fmt: skip
    for name, sizes in families.items():
        config = write_hf_config(model_type=name, vocab_size=300, bos_token_id=0, eos_token_id=0, **sizes)
        out = tmp_path / name
        summary = train(run_config(out=out, model__config=config, train__steps=20), listen())
        first = next(r["loss"] for r in read_rows(out) if "loss" in r)
        assert summary["val_loss"] < first - 0.2


def test_long_validation_text_is_not_handed_to_xz(tmp_path, run_config, listen, monkeypatch):
    from nativerank.cli.console import TrainConsole
    from nativerank.train import closing

    monkeypatch.setattr(closing, "XZ_BYTES", 10)
    monkeypatch.setattr(closing, "xz_bits_per_byte", lambda text: pytest.fail("it was"))
    summary = train(run_config(out=tmp_path / "a", train__steps=2), listen())
    assert summary["xz_bits_per_byte"] is None
    TrainConsole(quiet=True).summary(summary)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rank__ratio": 0.5}, "rank.ratio"),
        ({"rank__init": "sampled"}, "rank.init"),
        ({"rank__exclude": ["down_proj"]}, "rank.exclude"),
        ({"model__init_scale": 1.0}, "model.init_scale"),
        ({"model__config": "c.json"}, "model.config"),
    ],
)
def test_what_given_weights_would_overrule_is_refused(run_config, change, key):
    with pytest.raises(ValueError, match=rf"--init runs/a brings .*, so {key} has no meaning"):
        resolve(run_config(init="runs/a", **change))


def test_given_weights_bring_their_context_along_and_can_be_resumed(tmp_path, run_config, cli, listen):
    train(run_config(out=tmp_path / "a", train__steps=2), listen())
    config = resolve(run_config(init=tmp_path / "a", model__preset="pocket", train__context=None))
    assert config.train.context == 64, "the model's, below the preset's 128"
    train(run_config(out=tmp_path / "b", init=tmp_path / "a", train__steps=2), listen())
    again = cli("train", "--config", tmp_path / "b/config.yaml", "--train.steps", 3, "--resume", "auto")
    assert (again.code, again.err) == (0, "") and "resumed at step 2" in again.out


@pytest.mark.parametrize(
    ("changes", "shards", "wanted"),
    [
        ({"device": "cuda"}, 2, ("bf16", "fp32")),
        ({"device": "cuda", "parallel__precision": "fp32"}, 2, ("fp32", "fp32")),
        ({"device": "cuda", "parallel__reduce": "bf16"}, 2, ("bf16", "bf16")),
        ({"device": "cuda"}, 1, (None, None)),
        ({"device": "cpu"}, 2, (None, None)),
        ({"device": "cpu", "parallel__precision": "bf16"}, 2, ("bf16", "fp32")),
    ],
)
def test_shards_on_cuda_are_gathered_in_bfloat16_and_gradients_added_up_in_float32(run_config, changes, shards, wanted):
    found = precisions(run_config(**changes), Grid(shards=shards))
    assert (found["precision"], found["reduce"]) == wanted
