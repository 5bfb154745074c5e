"""Bad input: one line on stderr, exit code 2, and nothing made or half-written."""

import json
import shutil

import pytest
import torch

from nativerank.methods import METHODS
from nativerank.models import PRESETS


@pytest.fixture
def refused(tmp_path, cli, flags):
    """refused(*words, **settings): the one line of an error that left nothing behind, after `nativerank: error: `."""

    def check(*words, **changes):
        before = sorted(tmp_path.rglob("*"))
        result = cli("train", *flags(**{"out": tmp_path / "run", **changes}), *words)
        assert (result.code, result.out) == (2, ""), result
        assert result.err.startswith("nativerank: error: ") and result.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return result.err.removeprefix("nativerank: error: ").strip()

    return check


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("train.stesp", "train.steps"), ("otpim.lr", "optim.lr"), ("metod", "method"), ("optim.aux_rl", "optim.aux_lr")],
)
def test_an_unknown_key_names_the_nearest(refused, tmp_path, key, suggestion):
    wanted = f"unknown config key {key}; did you mean {suggestion}?"
    assert refused(f"--{key}", "3") == wanted
    assert refused(f"--{key}=3") == wanted
    group, _, name = key.rpartition(".")
    (tmp_path / "run.yaml").write_text(f"{group}:\n  {name}: 3\n" if group else f"{name}: 3\n")
    if group == "otpim":
        wanted = "unknown config key otpim; did you mean optim?"  # in a file the group itself is the wrong key
    assert refused("--config", tmp_path / "run.yaml") == wanted


def test_nothing_near_no_suggestion(refused):
    assert refused("--zzz", "3") == "unknown config key zzz"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.steps", "many", "config key train.steps must be a whole number or null, got many"),
        ("train.steps", "1.5", "config key train.steps must be a whole number or null, got 1.5"),
        ("optim.lr", "fast", "config key optim.lr must be a number or null, got fast"),
        ("optim.schedule", "linear", "config key optim.schedule must be one of cosine, wsd, constant, got linear"),
        ("device", "tpu", "config key device must be one of cpu, cuda, mps"),
        ("data.document_mask", "perhaps", "config key data.document_mask must be true or false"),
    ],
)
def test_a_value_of_the_wrong_type(refused, tmp_path, key, value, said):
    assert refused(f"--{key}", value).startswith(said)
    group, _, name = key.rpartition(".")
    (tmp_path / "run.yaml").write_text(f"{group}:\n  {name}: {value}\n" if group else f"{name}: {value}\n")
    assert refused("--config", tmp_path / "run.yaml").startswith(said)


OUT_OF_RANGE = {
    "train.steps": 0, "train.batch_size": -1, "train.accumulation": 0, "train.context": 0, "train.eval_every": -1,
    "train.keep": 0, "train.seed": -1, "train.eval_tokens": 0, "optim.lr": -0.1, "optim.aux_lr": -1, "optim.clip": -1,
    "optim.warmup": 1.5, "optim.decay": -0.1, "optim.final_lr": 2, "optim.orthogonalizer_steps": 0,
    "optim.power_iterations": 0, "guard.window": 0, "guard.max_events": 0, "guard.sigma_factor": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_number_out_of_range(refused, key):
    said = refused(f"--{key}", OUT_OF_RANGE[key])
    assert said.startswith(f"{key} must be ") and float(said.rpartition(" ")[2]) == OUT_OF_RANGE[key]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.lr", ".nan"], "optim.lr must be a finite number"),
        (["--optim.betas", "[0.9]"], "optim.betas"),
        (["--optim.betas", "[0.9, 1.0]"], r"optim\.betas must be in \[0, 1\), got"),
        (["--optim.momentum", "1.0"], r"optim\.momentum must be in \[0, 1\), got 1\.0"),
        (["--optim.lr", "1.5"], r"spectron's optim\.lr .* must be at most 1"),
        (["--rank.value", "0"], r"rank of model\.layers\.0\.self_attn\.q_proj must be an integer in \[1, 32\]"),
        (["--rank.value", "33"], r"got 33"),
        (["--rank.ratio", "0"], "rank ratio must be a positive number, got 0"),
        (["--rank.ratio", "0.5", "--rank.value", "8"], "give rank.ratio or rank.value, not both: 0.5, 8"),
        (["--rank.include", "[atention]"], "include pattern 'atention' matches none of the 14"),
        (["--rank.exclude", "[nope]"], "exclude pattern 'nope' matches none"),
        (["--rank.overrides", '{"nope": 3}'], "override pattern 'nope' matches none"),
        (["--rank.overrides", '{"q_proj": 99}'], r"rank of .*q_proj must be an integer in \[1, 32\].* got 99"),
        (["--train.tokens", "1000"], "give train.steps or train.tokens, not both: 8, 1000"),
        (["--train.context", "65"], "train.context 65 exceeds the model's max_position_embeddings 64"),
        (["--resume", "nonsense"], "--resume nonsense: no such checkpoint folder"),
        (["--config", "nowhere.yaml"], r"nowhere\.yaml"),
        (["--model.config", "nowhere.json"], r"cannot read the model config nowhere\.json"),
        (["--data.path", "nowhere"], "nowhere is not a prepared data folder; make one with: nativerank data prepare"),
        (["--init", "nowhere"], "--init nowhere brings architecture and ranks along, so model.config has no meaning"),
        (["--guard.action", "pray"], "guard.action must be one of off, skip, rollback"),
        (["stray"], "unrecognized arguments: stray"),
        (["--out"], "expected one argument"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(refused, words, said):
    import re

    assert re.search(said, message := refused(*words)), message


def test_unknown_methods_and_presets_list_the_known(refused):
    message = refused("--method", "spectrum")
    assert message.startswith("unknown method 'spectrum'; did you mean spectron?")
    assert all(name in message for name in METHODS)
    message = refused("--model.preset", "poket")
    assert message.startswith("unknown preset 'poket'; did you mean pocket?")
    assert all(name in message for name in PRESETS)


def test_a_dense_preset_with_a_low_rank_method(refused):
    message = refused("--model.preset", "pocket-dense", "--method", "lowrank-muon")
    assert "preset pocket-dense is dense and method lowrank-muon is not" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_a_device_that_is_not_there(refused):
    assert refused(device="cuda").startswith("--device cuda: this machine or this PyTorch build has none")


@pytest.mark.parametrize("text", ["method: [", "method: 'x", "- a\n- b\n", "just words", "\x00"])
def test_broken_yaml(refused, tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    assert refused("--config", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("{", "cannot read the model config"),
        ("[]", "names no model_type"),
        ({"model_type": "nosuchmodel"}, "nosuchmodel"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "llama", "hidden_size": "wide"}, "is no valid config"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, ""),
        ({"model_type": "llama", "vocab_size": 300, "hidden_size": -4}, ""),
    ],
)
def test_a_bad_config_json(refused, tmp_path, values, said):
    file = tmp_path / "bad.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    assert said in refused(model__config=file)


def test_a_vocabulary_too_small_for_the_data(refused, write_hf_config):
    message = refused(model__config=write_hf_config(vocab_size=299))
    assert message == "the model's vocabulary of 299 is smaller than the data's 300"


def test_a_validation_split_without_tokens(refused, without_validation):
    message = refused(data__path=without_validation)
    assert "the validation split of" in message and "holds no tokens" in message


def test_a_context_longer_than_the_data(refused, write_hf_config):
    config = write_hf_config(max_position_embeddings=10**7)
    assert "too few for one window" in refused(model__config=config, train__context=10**7)


def cut(file):
    file.write_bytes(file.read_bytes()[:-4])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip, lambda file: file.unlink()])
@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin"])
def test_a_damaged_shard_is_named(refused, prepared, tmp_path_factory, damage, name):
    data = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(prepared, data)
    damage(data / name)
    assert name in refused(data__path=data)


def test_an_altered_tokenizer(refused, prepared, other_prepared, tmp_path_factory):
    data = tmp_path_factory.mktemp("altered") / "data"
    shutil.copytree(prepared, data)
    shutil.copy(other_prepared / "tokenizer.json", data / "tokenizer.json")
    assert "a tokenizer other than the one the shards were made with" in refused(data__path=data)
    (data / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is not a tokenizer.json" in refused(data__path=data)


def test_other_files_in_the_output_folder(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    assert refused().endswith("run exists and is not a run folder; choose another --out")
    assert refused(resume="auto").endswith("run exists and is not a run folder; choose another --out")
    assert (tmp_path / "run/thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(out=tmp_path / "file")


def test_another_run_in_the_output_folder(cli, flags, tmp_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli("train", *flags(out=out)).code == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for words, said in [
        ([], "already holds a run; continue it with --resume auto, or choose another --out"),
        (["--resume", "auto", "--method", "lowrank-muon"], "holds another run, which differs in method, optim.lr"),
        (["--resume", "nonsense"], "nonsense is not a complete checkpoint"),
    ]:
        result = cli("train", *flags(out=out), *words)
        assert result.code == 2 and said in result.err and result.err.count("\n") == 1
    for text in ("method: [", "", "nonsense: 1"):
        (out / "config.yaml").write_text(text)
        result = cli("train", *flags(out=out, resume="auto"))
        assert result.code == 2 and "cannot read" in result.err and result.err.count("\n") == 1
    (out / "config.yaml").write_bytes(before[out / "config.yaml"])
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_weights_that_are_not_there(refused):
    assert refused(init="nowhere") == "no such folder: nowhere"


def test_weights_of_another_tokenizer(refused, cli, flags, other_prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli("train", *flags(out=out)).code == 0
    message = refused(data__path=other_prepared, init=out / "model")
    assert "was trained with another tokenizer" in message
    assert "holds lowrank layers, which dense-adamw does not train" in refused(init=out / "model", method="dense-adamw")
    (out / "model/tokenizer.json").unlink()
    # Without one nothing can be compared but sizes: 280 tokens fit into 300.
    assert cli("train", *flags(data__path=other_prepared, init=out / "model", out=out.with_name("next"))).code == 0


def test_documents_that_an_architecture_cannot_keep_apart(refused, write_hf_config):
    opt = write_hf_config(
        model_type="opt", vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    message = refused(model__config=opt, data__document_mask="true")
    assert message == "data.document_mask: opt models do not keep documents in a window apart"


def test_an_unknown_command(cli):
    for word, hint in (("trian", "; did you mean train?"), ("zzz", "")):
        result = cli(word)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"nativerank: error: unknown command '{word}'{hint} (commands: train, data")


def test_many_processes_that_nobody_started_are_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused()


def test_a_model_of_ours_is_no_architecture(refused, tmp_path_factory, tiny_config):
    import nativerank as nr
    from nativerank.models import materialize, read_hf_config, skeleton

    folder = tmp_path_factory.mktemp("saved") / "model"
    model = skeleton(read_hf_config(tiny_config))
    nr.factorize(model)
    nr.save(materialize(model, 0, 1.0), folder)
    for path in (folder, folder / "config.json"):
        assert refused(model__config=path).endswith(f"train its weights on with --init {folder}")


def test_a_damaged_built_in_corpus_says_how_to_mend_it(refused, prepared, tmp_path_factory, monkeypatch):
    from nativerank.train import setup

    data = tmp_path_factory.mktemp("demo") / "data"
    shutil.copytree(prepared, data)
    cut(data / "val-00000.bin")
    monkeypatch.setattr(setup, "prepared_demo", lambda vocab_size, quiet: data)
    message = refused(data__path="null")
    assert "val-00000.bin is truncated" in message
    assert message.endswith(f"the built-in corpus is made again if you delete {data}")
