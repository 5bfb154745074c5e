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


def test_an_end_of_text_token_with_a_name_of_its_own(cli, flags, prepared, tmp_path):
    """The model's config knows it, the tokenizer alone would not say which of its tokens it is."""
    from nativerank.data.prepare import prepare

    text = (prepared / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|finis|>"))
    (tmp_path / "book.txt").write_text("low rank factors of a matrix\n\n" * 900)
    options = dict(eot="<|finis|>", workers=1, quiet=True, val_fraction=0.2, chunk_bytes=700)
    prepare([str(tmp_path / "book.txt")], tmp_path / "data", str(tmp_path / "tokenizer.json"), **options)
    assert cli("train", *flags(out=tmp_path / "run", data__path=tmp_path / "data", train__steps=2)).code == 0
    result = cli("generate", tmp_path / "run", "--prompt", "low rank", "--max_new_tokens", "5")
    assert (result.code, result.err) == (0, "") and result.out.startswith("low rank")
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    config["base"]["eos_token_id"] = None
    (tmp_path / "run/model/config.json").write_text(json.dumps(config))
    assert "none of <|endoftext|>" in cli("generate", tmp_path / "run").err


def test_the_end_of_text_is_the_configs_where_the_tokenizer_has_it(prepared, tiny_config):
    from nativerank.data.shards import Dataset
    from nativerank.hub.generate import end_of_text
    from nativerank.models import read_hf_config, skeleton

    data, model = Dataset.open(prepared), skeleton(read_hf_config(tiny_config))
    for named, expected in ((7, 7), ([9, 7], 9), (50256, data.eot_id), ([50256, 5], 5), (None, data.eot_id)):
        model.config.eos_token_id = named
        assert end_of_text(model, data.tokenizer()) == expected
