"""nativerank export: what it prints, what it refuses."""

import json
import shutil

import pytest


@pytest.fixture
def run(trained_once):
    return trained_once(train__checkpoint_every=4, train__eval_every=0, rank__value=11)


def test_a_table_the_parity_and_where_it_is(cli, run, tmp_path):
    result = cli("export", run, "--format", "factored", "--merge", "auto", "--out", tmp_path / "mixed")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("model.layers")}
    assert len(rows) == 7, "the two blocks share rows"
    assert max(map(len, lines[:8])) <= 80
    assert rows["model.layers.*.self_attn.k_proj"] == ["2", "16", "x", "32", "11", "10.7", "dense"]
    assert rows["model.layers.*.self_attn.q_proj"] == ["2", "32", "x", "32", "11", "16.0", "factors"]
    said = {line.split("  ")[0]: line for line in lines}
    assert said["exported"].endswith(f"{run} at step 8")
    assert said["form"].endswith("mixed, float32: 4 of 14 factored matrices merged")
    assert "of max |logit| on 256 tokens of the validation data, at most 0.0001" in said["parity"]
    assert str(tmp_path / "mixed") in said["written to"]
    assert cli("generate", tmp_path / "mixed", "--prompt", "the", "--max_new_tokens", "4").code == 0


def test_json_and_quiet(cli, run, tmp_path):
    words = ["export", run, "--format", "dense", "--step", "4", "--dtype", "bfloat16"]
    result = json.loads(cli(*words, "--out", tmp_path / "a", "--json").out)
    assert (result["form"], result["dtype"], result["source"]) == ("dense", "bfloat16", f"{run} at step 4")
    assert (
        result["parity"]["measure"] == "mean_kl"
        and 0 < result["parity"]["mean_kl"] <= result["parity"]["bound"] == 1e-3
    )
    assert all(entry["merged"] for entry in result["matrices"])
    assert cli(*words, "--out", tmp_path / "b", "--quiet", "--json", tmp_path / "b.json").out == ""
    written = json.loads((tmp_path / "b.json").read_text())
    assert written == result | {"out": str(tmp_path / "b")}


def test_gguf_says_what_was_not_run(cli, run, tmp_path):
    pytest.importorskip("gguf")
    result = cli("export", run, "--format", "gguf", "--dtype", "float16", "--out", tmp_path / "gguf")
    assert result.code == 0 and (tmp_path / "gguf" / "model.gguf").is_file()
    assert "not run      llama.cpp itself was not run" in result.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "onnx"], "--format is one of factored, dense, gguf, got 'onnx'"),
        (["--format", "dense", "--merge", "none"], "--format dense goes with --merge all or auto, got none"),
        (["--format", "dense", "--dtype", "int4"], "--dtype of --format dense is one of"),
        (["--format", "dense", "--step", "3"], "has no checkpoint of step 3; there are: 4, 8"),
        (["--format", "dense", "--step", "x"], "invalid int value: 'x'"),
        (["--format", "dense", "--out", "taken"], "taken exists and is not empty"),
        (["--format", "gguf", "--out", "model.gguf"], "--out model.gguf is to be a folder"),
        (["--format", "dense", "--json", "no/such/place.json"], "there is no folder no/such"),
        ([], "the following arguments are required: --format"),
    ],
)
def test_bad_flags(cli, run, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    result = cli("export", run, "--out", "out", *words)
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1 and said in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_bad_folders(cli, run, tmp_path, flags):
    def error(path, *words):
        result = cli("export", path, "--format", "dense", "--out", tmp_path / "out", *words)
        assert result.code == 2 and result.out == "" and not (tmp_path / "out").exists()
        return result.err

    assert "no such folder" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is not a run, a checkpoint or a model folder" in error(tmp_path / "empty")
    begun = shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("model", "checkpoints"))
    assert "begun has no complete checkpoint yet; continue it with --resume auto" in error(begun)
    guided = tmp_path / "guided"
    words = flags(out=guided, method="self-guided", train__checkpoint_every=2, train__keep=9)
    assert cli("train", *words).code == 0
    assert "still has the dense guides of self-guided training" in error(guided, "--step", "2")
    assert cli("export", guided, "--format", "dense", "--out", tmp_path / "out").code == 0
