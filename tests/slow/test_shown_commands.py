"""Every command that README and docs show, run as it is shown, beside the folders that it speaks of.

Lengths are cut (`SMALLER`, `TINY`); comparisons are planned instead of made; what needs a network, a GPU or minutes of
measuring is named in `LEFT_OUT` with the reason. That all of them parse is held by tests/test_readme.py.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_readme import commands

from nativerank.cli.main import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "results"
LEFT_OUT = {
    r"^nativerank bench ": "measures for minutes; tests/bench runs each of them small",
    r"hub:": "needs a network",
    r"--tasks ": "needs a network, or tasks of one's own; tests/evaluate/test_tasks.py runs such",
    r"--train\.float8": "needs a GPU; tests/train runs it emulated",
    r"^nativerank reproduce .*--jobs": "trains for up to 90 minutes; tests/reproduce runs a card small",
    r"^nativerank reproduce --scale paper": "plans for three minutes; tests/reproduce holds the plans to their runs",
    r"llama3-70b": "a minute; tests/accounting traces it",
}
SMALLER = {
    r"--train\.steps (\d{2,})": "--train.steps 2",
    r"--step \d+": "--step 2",
    r"step-000200": "step-000002",
    r"--max_new_tokens \d+": "--max_new_tokens 4",
    r"(--model\.preset )spectron-s(?= --out)": r"\1pocket",
    r"--context 256 --stride 64": "--context 32 --stride 8",
    r"data prepare": "data prepare --chunk_bytes 700",
}
TINY = {"--train.steps": "2", "--train.context": "32", "--train.batch_size": "2", "--train.accumulation": "1"}
TINY |= {"--train.eval_tokens": "256"}
LLAMA = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"]}


def runs_shown():
    """Names of the runs that a command reads, by `runs/NAME` at any place but after --out."""
    return {name for line in commands() for name in re.findall(r"(?<!--out )\bruns/([\w-]+)", line)}


@pytest.fixture(scope="module")
def scene(tmp_path_factory, prepared):
    """A folder with everything that a page takes for granted."""
    folder = tmp_path_factory.mktemp("shown")
    text = (prepared.parent / "book.txt").read_text()
    for name in ("my-texts", "stories", "path/to", "runs", "data"):
        (folder / name).mkdir(parents=True)
    for name in ("book.txt", "my-texts/one.txt", *(f"stories/{i}.txt" for i in range(40))):
        (folder / name).write_text(text)
    (folder / "questions.jsonl").write_text('{"context": "the low", "choices": ["rank", "tide"], "answer": 0}\n' * 3)
    (folder / "prompts.jsonl").write_text('{"prompt": "the low rank"}\n{"prompt": "every token"}\n')
    for name in ("config.json", "path/to/config.json"):
        (folder / name).write_text(json.dumps(LLAMA))
    for name in ("book", "mine"):
        (folder / "data" / name).symlink_to(prepared)
    flags = ["--data.path", str(prepared), "--train.checkpoint_every", "1", "--quiet", *sum(TINY.items(), ())]
    train = ["train", "--model.preset", "pocket", *flags, "--out"]
    assert main([*train, str(folder / "runs" / "demo-spectron")]) == 0
    assert main([*train, str(folder / "runs" / "dense"), "--method", "dense-adamw"]) == 0
    for name in runs_shown() - {"demo-spectron", "dense", "dense-r", "sweep", "three"}:
        shutil.copytree(folder / "runs" / "demo-spectron", folder / "runs" / name)
    export = ["export", str(folder / "runs" / "dense"), "--format", "dense", "--quiet", "--out"]
    for name in ("path/to/model", "path/to/dense-model", "exported/dense"):
        (folder / name).parent.mkdir(exist_ok=True)
        assert main([*export, str(folder / name)]) == 0
    thin = ["convert", str(folder / "runs" / "dense"), "--rank.energy", "0.8", "--quiet"]
    assert main([*thin, "--data.path", str(prepared), "--out", str(folder / "runs" / "dense-r")]) == 0
    shutil.copytree(RECORDS / "scaling-miniature", folder / "runs" / "sweep")
    shutil.copytree(ROOT / "reproductions", folder / "reproductions")
    (folder / "runs" / "three").mkdir()
    shutil.copy(RECORDS / "compare-frames.json", folder / "runs" / "three" / "compare.json")
    return folder


def smaller(line):
    """The words of a command, cut to seconds."""
    for pattern, shorter in SMALLER.items():
        line = re.sub(pattern, shorter, line)
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "train":
        for flag, value in TINY.items():
            words += [] if flag in words else [flag, value]
        words += [] if "--data.path" in words else ["--data.path", "data/book"]
        words += [] if "--out" in words else ["--out", "runs/new"]
    return [*words, "--plan"] if words[0] == "compare" else words


@pytest.mark.parametrize("line", commands())
def test_it_works_as_shown(line, scene, tmp_path, monkeypatch, capfd):
    for pattern, reason in LEFT_OUT.items():
        if re.search(pattern, line):
            pytest.skip(reason)
    for module, words in (("torchao", "int8"), ("gguf", "gguf"), ("pyarrow", "parquet")):
        if words in line:
            pytest.importorskip(module)
    folder = tmp_path / "here"
    shutil.copytree(scene, folder, symlinks=True)
    if "parquet" in line:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [(scene / "book.txt").read_text()] * 40}), folder / "wiki.parquet")
    monkeypatch.chdir(folder)
    words = smaller(line)
    out = words[words.index("--out") + 1] if "--out" in words else None
    if out and words[0] not in ("scaling", "report"):  # what it makes is not there yet
        shutil.rmtree(folder / out, ignore_errors=True) if not (folder / out).is_symlink() else (folder / out).unlink()
    assert main(words) == 0, capfd.readouterr().err
    if out and words[0] != "compare":
        assert (folder / out).exists()
