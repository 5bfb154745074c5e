"""nativerank data: what a program reads on standard output is JSON and nothing else."""

import argparse
import json
import random

import pytest

from nativerank.cli.data import add_parser


def run(*words):
    parser = argparse.ArgumentParser(prog="nativerank")
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NATIVERANK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def book(tmp_path):
    source = random.Random(0)
    words = "low rank factors learn the language of long books slowly but surely".split()
    text = "\n\n".join(" ".join(source.choices(words, k=60)) for _ in range(300))
    (tmp_path / "book.txt").write_text(text)
    return tmp_path / "book.txt"


def test_prepare_info_and_verify(tmp_path, book, capsys):
    out = tmp_path / "out"
    assert run("data", "prepare", book, "--out", out, "--tokenizer", "train:300", "--seed", 3, "--json") == 0
    captured = capsys.readouterr()
    prepared = json.loads(captured.out)
    assert "note: little text" in captured.err and "MB/s" in captured.err
    assert prepared["seed"] == 3 and prepared["val_fraction"] == 0.05
    assert sum(entry["text_bytes"] for entry in prepared["splits"].values()) == book.stat().st_size

    assert run("data", "info", out, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info == {key: prepared[key] for key in info}

    assert run("data", "info", out, "--json", tmp_path / "info.json") == 0
    assert json.loads((tmp_path / "info.json").read_text()) == info
    table = capsys.readouterr().out
    assert "train" in table and f"{info['splits']['val']['tokens']:,}" in table

    assert run("data", "verify", out) == 0
    assert "as the manifest says" in capsys.readouterr().out
    assert run("data", "verify", out, "--json") == 0
    verified = json.loads(capsys.readouterr().out)
    assert (verified["path"], verified["shards"]) == (str(out), len(list(out.glob("*.bin"))))
    (out / "val-00000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"val-00000\.bin is truncated"):
        run("data", "verify", out)


def test_quiet_prints_nothing(tmp_path, book, capsys):
    out, options = tmp_path / "out", ["--quiet", "--val_fraction", 0.2, "--workers", 1, "--shard_tokens", 1000]
    run("data", "prepare", book, "--out", out, "--tokenizer", "train:300", "--chunk_bytes", 1000, *options)
    run("data", "verify", out, "--quiet")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert len(list(out.glob("train-*.bin"))) > 2


@pytest.mark.parametrize("command", [[], ["prepare"], ["info"], ["verify"]])
def test_every_help_ends_with_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run("data", *command, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.strip().splitlines()[-1].startswith("  nativerank data ")


WRONG_USAGE = [["prepare", "a.txt"], ["prepare", "--out", "x"], ["info", "x", "--wrokers", "2"], ["verify"]]


@pytest.mark.parametrize("words", WRONG_USAGE)
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        run("data", *words)
    assert stop.value.code == 2
    assert "usage: nativerank" in capsys.readouterr().err
