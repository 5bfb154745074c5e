"""nativerank convert: what a person sees, and one line for what is wrong."""

import json
import shutil
from dataclasses import replace

import pytest

import nativerank as nr
from nativerank.cli.train import parse
from nativerank.config import OptimConfig
from nativerank.convert import KINDS
from nativerank.data.shards import Dataset
from nativerank.models import materialize, read_hf_config, skeleton
from nativerank.train.loop import train
from nativerank.train.resolve import resolve


@pytest.fixture(scope="module")
def dense(tmp_path_factory, prepared, tiny_config):
    """A dense model with the tokenizer of `prepared`."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    model = materialize(skeleton(read_hf_config(tiny_config)), 0, 1.0)
    nr.save(model, folder, tokenizer=Dataset.open(prepared).tokenizer())
    return folder


def refusal(done):
    """What the one line says by which a command refused."""
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1, done.err
    return done.err.removeprefix("nativerank: error: ")


@pytest.fixture
def go(cli, dense, tmp_path):
    return lambda *words: cli("convert", dense, "--out", tmp_path / "m", *words)


def test_the_result_is_shown(go, prepared, tmp_path):
    done = go("--rank.energy", "0.7", "--data", prepared)
    assert done.code == 0 and done.err == ""
    lines = done.out.splitlines()
    assert lines[0].split() == ["matrix", "count", "d_out", "x", "d_in", "rank", "kept", "dense", "factors"]
    assert "..yers.*.mlp.up_proj" in done.out and "14 matrices" in done.out and len(lines[: lines.index("")]) == 9
    assert max(len(line) for line in lines if str(tmp_path.parent) not in line and str(prepared) not in line) <= 80
    assert [line.split()[1] for line in lines if line.startswith("loss")] == ["before", "after"]
    assert lines[-1].endswith(
        f"train --init {tmp_path / 'm'} --method spectron --optim.lr 0.02 --optim.aux_lr 0.0025 --data.path DATA"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_at_a_quarter_of_the_rates_by_the_line_that_is_shown(
    cli, go, listen, prepared, tmp_path, kind
):
    words = go("--rank.value", "4", "--kind", kind).out.splitlines()[-1].removeprefix("train on with").split()
    config, _ = parse([*words[2:-1], str(prepared), "--out", str(tmp_path / "run"), "--train.steps", "2"])
    fresh = resolve(replace(config, optim=OptimConfig())).optim
    for name in ("lr", "aux_lr", "s_lr") if kind == "spectral" else ("lr", "aux_lr"):
        assert getattr(config.optim, name) == pytest.approx(getattr(fresh, name) / 4)
    summary = train(config, listen())
    assert set(summary["ranks"].values()) == {4}


def test_json_alone_goes_to_standard_output_and_warnings_to_the_other(go):
    done = go("--rank.ratio", "0.95", "--json")
    result = json.loads(done.out)
    assert set(result) == {"source", "out", "kind", "parameters", "matrices", "loss"}
    assert result["loss"] is None and result["parameters"]["before"]["total"] < result["parameters"]["after"]["total"]
    assert {m["rank"] for m in result["matrices"] if m["d_out"] != 16} == {30} and len(result["matrices"]) == 14
    assert done.err.startswith("warning: ") and "nothing is saved" in done.err


def test_json_into_a_file_and_quiet(go, prepared, tmp_path):
    done = go("--rank.ratio", "0.2", "--quiet", "--json", tmp_path / "r.json", "--data", prepared)
    assert done.code == 0 and done.out == ""
    losses = json.loads((tmp_path / "r.json").read_text())["loss"]
    assert set(losses) == {"before", "after", "context"} and losses["before"]["nats"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "how thin? give --rank.energy"),
        (["--rank.energy", "0"], "rank energy must lie in (0, 1], got 0"),
        (["--rank.energy", "1.5"], "rank energy must lie in (0, 1], got 1.5"),
        (["--rank.energy", "nan"], "config key rank.energy must be"),
        (["--rank.energy", "0.9", "--rank.ratio", "0.5"], "give a rank ratio or a rank energy, not both"),
        (["--rank.value", "0"], "rank of model.layers.0.self_attn.q_proj must be an integer in [1, 32]"),
        (["--rank.value", "33"], "rank of model.layers.0.self_attn.q_proj must be an integer in [1, 32]"),
        (["--rank.energy", "0.9", "--rank.value", "-1"], "rank of model.layers.0.self_attn.q_proj must be an integer"),
        (["--rank.ratio", "0.5", "--rank.include", '["nope"]'], "include pattern 'nope' matches none of the 14"),
        (["--rank.ratio", "0.5", "--rank.overrides", '{"nope": 3}'], "override pattern 'nope' matches none"),
        (["--rank.ratio", "0.5", "--rank.enrgy", "1"], "unknown config key rank.enrgy; did you mean rank.energy?"),
        (["--rank.init", "flat"], "config key rank.init has no meaning for nativerank convert\n"),
        (["--rank.adapt.threshold", "0.9"], "config key rank.adapt.threshold has no meaning for nativerank convert\n"),
        (["--train.steps", "9"], "config key train.steps has no meaning for nativerank convert\n"),
        (["--zzz", "9"], "unknown config key zzz\n"),
        (["--rank.ratio", "0.5", "--kind", "guided"], "--kind is lowrank or spectral, got 'guided'"),
        (["--rank.ratio", "0.5", "--data", "nowhere.txt"], "--data nowhere.txt: no such file or folder"),
        (["--rank.ratio", "0.5", "--data", "."], ". is not a prepared data folder"),
        (["--rank.ratio", "0.5", "--eval_tokens", "0"], "--eval_tokens must be at least 1, got 0"),
        (["--rank.ratio", "0.5", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(go, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert refusal(go(*words)).startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_converted(cli, dense, other_prepared, tmp_path):
    def refused(source, *words):
        return refusal(cli("convert", source, "--rank.value", "4", "--out", tmp_path / "m", *words))

    assert refusal(cli("convert")) == "convert needs HF_DIR, the folder of a dense model\n"
    assert refusal(cli("convert", dense, "--rank.value", "4")).startswith("convert needs --out DIR")
    assert refused(tmp_path / "nowhere").startswith("no such folder")
    assert "is neither a run nor a model folder" in refused(tmp_path)
    assert "was made with another tokenizer" in refused(dense, "--data", other_prepared)
    bare = shutil.copytree(dense, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    (tmp_path / "a.txt").write_text("some text")
    assert "holds no tokenizer.json to read" in refused(bare, "--data", tmp_path / "a.txt")
    (bare / "model.safetensors").unlink()
    assert "cannot read the weights" in refused(bare)
    assert cli("convert", dense, "--rank.value", "4", "--out", tmp_path / "m").code == 0
    assert "m exists and is not empty" in refused(dense)
    assert "is in low rank already (lowrank layers)" in refused(tmp_path / "m", "--out", tmp_path / "n")


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        (
            "lowrank",
            ["sct"],
            "holds lowrank layers, which sct does not train; take spectron, lowrank-adamw, lowrank-muon, adam-muon, "
            "stiefel-spectron --optim.frames one\n",
        ),
        (
            "lowrank",
            ["stiefel-spectron"],
            "which stiefel-spectron does not train; take spectron, lowrank-adamw, lowrank-muon, adam-muon, stiefel-",
        ),
        (
            "spectral",
            ["stiefel-spectron", "--optim.frames", "one"],
            "holds spectral layers, which stiefel-spectron --optim.frames one does not train; take sct, tsvd, "
            "stiefel-spectron --optim.frames both\n",
        ),
        (None, ["spectron"], "which spectron does not train; take dense-adamw, dense-muon, or nativerank convert it"),
    ],
)
def test_a_method_that_does_not_fit_the_layers(cli, dense, tmp_path, prepared, kind, words, said):
    if kind:
        assert cli("convert", dense, "--out", tmp_path / "m", "--rank.value", "4", "--kind", kind).code == 0
    start = tmp_path / "m" if kind else dense
    done = cli("train", "--init", start, "--data.path", prepared, "--out", tmp_path / "run", "--method", *words)
    assert said in refusal(done) and not (tmp_path / "run").exists()


def test_a_first_run_can_choose_its_ranks_by_energy(cli, flags, tmp_path):
    for out, words in (("a", []), ("b", ["--rank.value", "9"])):
        done = cli("train", *flags(out=tmp_path / out, rank__energy=0.6), *words, "--quiet")
        assert done.code == 0, done.err
    configs = [json.loads((tmp_path / out / "model/config.json").read_text()) for out in "ab"]
    ranks = [config["nativerank"]["factors"]["lowrank"] for config in configs]
    assert {name: min(rank, 9) for name, rank in ranks[0].items()} == ranks[1] and max(ranks[0].values()) > 9
    refused = refusal(cli("train", *flags(out=tmp_path / "c", rank__energy=1.5)))
    assert "rank.energy must lie in (0, 1], got 1.5" in refused
