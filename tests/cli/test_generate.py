"""nativerank generate: reads what train wrote; the same seed gives the same text."""

import json
import shutil

import pytest


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def run(cli, flags, tmp_path_factory, known):
    if not known:
        known["run"] = tmp_path_factory.mktemp("runs") / "run"
        assert cli("train", *flags(out=known["run"])).code == 0
    return known["run"]


def test_a_run_and_its_model_folder_give_the_same_text(cli, run):
    words = ["--prompt", "the low rank", "--max_new_tokens", "12"]
    one = cli("generate", run, *words)
    two = cli("generate", run / "model", *words)
    assert (one.code, one.err) == (0, "") and one.out == two.out
    assert one.out.startswith("the low rank") and len(one.out) > len("the low rank\n")
    assert cli("generate", run, *words, "--seed", "1").out != one.out


def test_json(cli, run, tmp_path):
    words = ["generate", run, "--prompt", "the", "--max_new_tokens", "5"]
    result = json.loads(cli(*words, "--json").out)
    assert result["prompt"] == "the" and cli(*words).out == f"the{result['text']}\n"
    assert cli(*words, "--json", tmp_path / "x.json").out == ""
    assert json.loads((tmp_path / "x.json").read_text()) == result


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_new_tokens", "0"], "max_new_tokens must be >= 1"),
        (["--temperature", "-1"], "temperature and top_k >= 0"),
        (["--temperature", "nan"], "temperature"),
        (["--top_k", "-1"], "temperature and top_k >= 0"),
        (["--max_new_tokens", "x"], "invalid int value: 'x'"),
        (["--wrong"], "unrecognized arguments: --wrong"),
        (["--prompt", "the " * 200], "the model's context only 64"),
    ],
)
def test_bad_flags(cli, run, words, said):
    result = cli("generate", run, *words)
    assert result.code == 2 and result.err.count("\n") == 1 and said in result.err


def test_bad_folders(cli, run, tmp_path):
    def error(path):
        result = cli("generate", path)
        assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
        return result.err

    assert "no such folder" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither a run nor a model folder" in error(tmp_path / "empty")
    (tmp_path / "empty/metrics.jsonl").write_text("")
    assert "has not finished" in error(tmp_path / "empty")
    copy = tmp_path / "copy"
    shutil.copytree(run / "model", copy)
    (copy / "tokenizer.json").unlink()
    assert "holds no tokenizer.json" in error(copy)
    shutil.copy(run / "model/tokenizer.json", copy)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-100])
    assert "cannot read" in error(copy) and "model.safetensors" in error(copy)
    for text in ("{", "[]", '{"model_type": "nativerank"}', "{}"):
        (copy / "config.json").write_text(text)
        assert "config" in error(copy)
