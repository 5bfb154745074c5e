"""nativerank generate: reads what train wrote; the same seed gives the same text."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest

import nativerank as nr


@pytest.fixture
def run(trained_once):
    return trained_once()


WORDS = ["--prompt", "the low rank", "--max_new_tokens", "12"]


def test_a_run_its_model_folder_and_its_checkpoint_give_the_same_text(cli, run):
    one = cli("generate", run, *WORDS, "--quiet")
    assert (one.code, one.err) == (0, "")
    assert one.out.startswith("the low rank") and len(one.out) > len("the low rank\n")
    for path in (run / "model", run / "checkpoints/step-000008"):
        assert cli("generate", path, *WORDS).out == one.out
    assert cli("generate", run, *WORDS, "--step", "8").out == one.out
    assert cli("generate", run, *WORDS, "--seed", "1").out != one.out


def test_a_run_that_has_not_finished_gives_its_newest_checkpoint(cli, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    found = cli("generate", tmp_path / "run", *WORDS)
    assert (found.code, found.out) == (0, cli("generate", run, *WORDS).out) and "at step 8, factored" in found.err


def test_forms(cli, run, tmp_path):
    dense = tmp_path / "dense"
    nr.save(nr.load(run), dense, format="dense")
    shutil.copy(run / "model/tokenizer.json", dense)
    words = [*WORDS, "--temperature", "0"]
    found = {form: cli("generate", run, *words, "--form", form) for form in ("auto", "factored", "merged")}
    assert len({f.out for f in found.values()} | {cli("generate", dense, *words).out}) == 1
    first = {form: f.err.splitlines()[0] for form, f in found.items()}
    assert first["merged"].endswith(", merged: as asked") and first["factored"].endswith(", factored: as asked")
    assert "factored: counted, 0." in first["auto"]
    assert cli("generate", dense, *words).err.splitlines()[0].endswith("dense: the model holds no factors")
    refused = cli("generate", dense, *words, "--form", "factored")
    assert (refused.code, refused.err) == (2, "nativerank: error: form factored: the model holds no factors\n")


def test_a_stock_gpt2_folder_and_its_factored_conversion(cli, run, tmp_path, write_hf_config):
    from nativerank.layers import factorize_modules
    from nativerank.models import materialize, read_hf_config, skeleton

    sizes = dict(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = materialize(skeleton(read_hf_config(write_hf_config(model_type="gpt2", **sizes))), 0, 3.0)
    model.save_pretrained(tmp_path / "stock")
    factorize_modules(model, ratio=0.5)
    nr.save(model, tmp_path / "factored")
    for folder, form in (("stock", "dense"), ("factored", "factored")):
        shutil.copy(run / "model/tokenizer.json", tmp_path / folder)
        found = cli("generate", tmp_path / folder, *WORDS)
        assert found.code == 0 and found.out.startswith("the low rank") and f", {form}: " in found.err


def test_the_python_of_the_page_runs(run, tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs/generate.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/a").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names = {}
    exec(code, names)
    assert capsys.readouterr().out == names["text"] != ""


def test_speed_is_said_beside_the_text(cli, run):
    found = cli("generate", run, *WORDS)
    assert len(found.err.splitlines()) == 2
    tokens, seconds, rate = re.fullmatch(r"(\d+) tokens in (\S+) s: (\S+) tokens/s", found.err.splitlines()[1]).groups()
    assert 1 <= int(tokens) <= 12
    rounding = 0.006  # seconds are printed to 0.01, and a short text takes only a few of those
    slowest, fastest = (int(tokens) / max(float(seconds) + error, 1e-9) for error in (rounding, -rounding))
    assert slowest <= float(rate.replace(",", "")) <= fastest


def test_json(cli, run, tmp_path):
    words = ["generate", run, "--prompt", "the", "--prompt", "low", "--max_new_tokens", "5", "--quiet"]
    result = json.loads(cli(*words, "--json").out)
    one, two = result["texts"]
    assert (one["prompt"], two["prompt"]) == ("the", "low") and result["form"] == "factored"
    assert cli(*words).out == f"the{one['text']}\n\nlow{two['text']}\n"
    assert result["tokens"] == one["tokens"] + two["tokens"] <= 10
    assert result["seconds"] >= one["seconds"] > 0 and result["batch_size"] == 2
    assert cli(*words, "--json", tmp_path / "x.json").out == ""
    assert json.loads((tmp_path / "x.json").read_text())["texts"][1]["text"] == two["text"]


def test_streamed_and_batched_are_the_same_bytes(cli, run):
    words = ["generate", run, "--prompt", "the", "--prompt", "low rank", "--max_new_tokens", "9", "--num", "2"]
    assert cli(*words, "--batch_size", "1").out == cli(*words).out == cli(*words, "--batch_size", "3").out


def test_it_is_streamed(cli, run, monkeypatch):
    pieces = []
    monkeypatch.setattr("sys.stdout.write", pieces.append)
    assert cli("generate", run, *WORDS).code == 0
    assert pieces[0] == "the low rank" and len(pieces) > 5


def test_a_terminal_gets_no_control_characters(monkeypatch):
    from nativerank.cli.generate import printer

    pieces = []
    monkeypatch.setattr("sys.stdout.write", pieces.append)
    printer()("a\x1b[2J\nb\t")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    printer()("a\x1b[2J\nb\t\x9b")
    assert pieces == ["a\x1b[2J\nb\t", "a\ufffd[2J\nb\t\ufffd"]


def test_prompts_from_files_and_standard_input(cli, run, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the low\n\n  \nmatrix  \r\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "the low"}\n\n{"id": 3, "prompt": "matrix  "}\n')
    words = ["generate", run, "--max_new_tokens", "6", "--quiet"]
    expected = cli(*words, "--prompt", "the low", "--prompt", "matrix  ").out
    assert expected.startswith("the low") and "\n\nmatrix  " in expected
    for name in ("a.txt", "a.jsonl"):
        assert cli(*words, "--prompts", tmp_path / name).out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"matrix  \n")))
    assert cli(*words, "--prompt", "the low", "--prompts", "-").out == expected


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"\n \n", "a.txt holds no prompts"),
        ("a.txt", b"one\ntw\xffo\n", "a.txt is not UTF-8: byte 0xff at offset 6"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "a.jsonl, line 2: no field 'prompt'; the record has 'text'"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "a.jsonl, line 2: field 'prompt' holds int, not text"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt"\n', "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl.gz", b"nothing packed", "a.jsonl.gz is damaged"),
        ("a.parquet", b"", "a text file or .jsonl is needed"),
        (None, b"", "no such file with prompts"),
    ],
)
def test_prompt_files_that_cannot_be_read(cli, run, tmp_path, name, data, said):
    if name:
        (tmp_path / name).write_bytes(data)
    result = cli("generate", run, "--prompts", tmp_path / (name or "nothing"))
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1 and said in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_new_tokens", "0"], "max_new_tokens must be >= 1, got 0"),
        (["--temperature", "-1"], "temperature must be >= 0 and finite, got -1.0"),
        (["--temperature", "nan"], "temperature must be >= 0 and finite, got nan"),
        (["--top_k", "-1"], "top_k must be >= 0, got -1"),
        (["--top_p", "0"], "top_p must lie in (0, 1], got 0.0"),
        (["--top_p", "1.5"], "top_p must lie in (0, 1], got 1.5"),
        (["--num", "0"], "num must be >= 1, got 0"),
        (["--num", "2", "--temperature", "0"], "temperature 0 gives one text per prompt"),
        (["--batch_size", "0"], "batch_size must be >= 1, got 0"),
        (["--max_new_tokens", "x"], "invalid int value: 'x'"),
        (["--form", "dense"], "invalid choice: 'dense'"),
        (["--step", "3"], "has no checkpoint of step 3"),
        (["--wrong"], "unrecognized arguments: --wrong"),
        (["--prompt", "the " * 200], "the model's context only 64"),
        (["--prompt", "a", "--prompt", "the " * 200], "prompt 2: the prompt has"),
    ],
)
def test_bad_flags(cli, run, words, said):
    result = cli("generate", run, *words)
    assert result.code == 2 and result.err.count("\n") == 1 and said in result.err


def test_numbers_are_checked_before_weights(cli):
    assert "num must be >= 1, got 0" in cli("generate", "nowhere", "--num", "0").err


def test_a_context_that_ends_first_is_said(cli, run):
    found = cli("generate", run, "--prompt", "the", "--max_new_tokens", "1000", "--temperature", "0")
    assert re.search(r"^the context leaves room for \d\d of 1000 new tokens$", found.err, re.MULTILINE), found.err


def test_bad_folders(cli, run, tmp_path):
    def error(path):
        result = cli("generate", path)
        assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
        return result.err

    assert "no such folder" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is not a run, a checkpoint or a model folder" in error(tmp_path / "empty")
    shutil.copy(run / "config.yaml", tmp_path / "empty")
    assert "has no complete checkpoint yet" in error(tmp_path / "empty")
    copy = tmp_path / "copy"
    shutil.copytree(run / "model", copy)
    (copy / "tokenizer.json").unlink()
    assert "has no tokenizer, so there is no way to read the prompt" in error(copy)
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
    result = cli("generate", tmp_path / "run", "--prompt", "low rank", "--max_new_tokens", "5", "--quiet")
    assert (result.code, result.err) == (0, "") and result.out.startswith("low rank")
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    config["eos_token_id"] = None
    (tmp_path / "run/model/config.json").write_text(json.dumps(config))
    assert "none of <|endoftext|>" in cli("generate", tmp_path / "run").err


def test_the_end_of_text_is_the_configs_where_the_tokenizer_has_it(prepared, tiny_config):
    from nativerank.data.shards import Dataset
    from nativerank.models import end_of_text, read_hf_config, skeleton

    data, model = Dataset.open(prepared), skeleton(read_hf_config(tiny_config))
    for named, expected in ((7, 7), ([9, 7], 9), (50256, data.eot_id), ([50256, 5], 5), (None, data.eot_id)):
        model.config.eos_token_id = named
        assert end_of_text(model, data.tokenizer()) == expected
