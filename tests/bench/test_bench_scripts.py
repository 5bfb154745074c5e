"""The page of benchmarks: its commands exist with these flags, it names every record; scripts write the common form."""

import argparse
import importlib
import importlib.util
import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from nativerank.cli.main import COMMANDS, Parser

FOLDER = Path(__file__).parents[2] / "benchmarks"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "`" in line]
COMMAND = re.compile(r"`(?:\w+=\w+ )?((?:nativerank|python benchmarks/)[^`]+)`")
CALLS = sorted({call for row in ROWS for call in COMMAND.findall(row.split(" | ")[1])})


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_has_a_command():
    assert len(ROWS) > 20
    assert [row for row in ROWS if not COMMAND.search(row) and "the command above each table" not in row] == []


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith("nativerank")])
def test_its_commands_have_these_flags(call):
    words = shlex.split(call)[1:]
    assert words[0] in COMMANDS
    parser = Parser(prog="nativerank", add_help=False)
    importlib.import_module(f"nativerank.cli.{words[0]}").add_parser(parser.add_subparsers(parser_class=Parser))
    assert callable(parser.parse_args(words).run)


class FlagsAreRead(Exception):
    """All of them are known."""


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith("python")])
def test_its_scripts_have_these_flags(call, monkeypatch):
    name, *words = shlex.split(call)[1:]
    file = FOLDER.parent / name
    assert file.is_file()
    if not words:
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, arguments=None, namespace=None):
        parse(self, words)
        raise FlagsAreRead

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(FlagsAreRead):
        script(file.stem).main()


def test_every_record_is_on_it():
    named = {name for row in ROWS for name in re.findall(r"`([\w*-]+\.json)`", row)}
    records = {file.name for file in (FOLDER / "results").glob("*.json")}
    assert [record for record in sorted(records) if not any(fnmatch(record, name) for name in named)] == []
    awaited = {"gpu-*.json"}
    assert {name for name in named if not any(fnmatch(record, name) for record in records)} <= awaited


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


TINY = {
    "recompute": "--preset pocket --layers 1 --batch_size 2 --context 16 --repeats 2 --clock cpu",
    "joint_products": "--d_model 64 --repeats 2",
    "waterfall": "--preset pocket --layers 1 --batch_size 1 --repeats 1",
}
FIGURES = {
    "recompute": {"waiting_bytes", "peak_bytes", "same_bits"},
    "joint_products": {"ratio_quartiles"},
    "waterfall": {"waterfall", "milliseconds", "gflop"},
}


@pytest.mark.parametrize("name", TINY)
def test_their_records_have_the_common_form(name, tmp_path, threads, capsys):
    file = tmp_path / "record.json"
    script(name).main([*TINY[name].split(), "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["benchmark"] == name and {"settings", "environment", "cases"} <= set(found)
    for case in found["cases"]:
        assert {"case", "reference", "seconds", "spread", "ratio"} | FIGURES[name] == set(case)
        assert case["ratio"][case["reference"]] == 1 and case["case"]["threads"] == 1
    if name == "recompute":
        bytes_, bits = found["cases"][0]["waiting_bytes"], found["cases"][0]["same_bits"]
        assert bytes_["none"] > bytes_["up"] > bytes_["up, attention too"] > bytes_["blocks"] and all(bits.values())
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("waterfall", "--method dense-adamw", "--method must be a low-rank method, got dense-adamw"),
        ("waterfall", "--repeats 0", "--repeats must be at least 1, got 0"),
        ("waterfall", "--json /nowhere/x.json", "there is no folder /nowhere"),
        ("recompute", "--preset foo", "unknown preset 'foo'"),
        ("recompute", "--threads 2 --clock cpu", "--clock cpu adds up"),
        ("recompute", "--json /nowhere/x.json", "there is no folder /nowhere"),
        ("joint_products", "--repeats 1", "--repeats must be at least 2"),
        ("joint_products", "--d_model 65", "multiple of 64"),
    ],
)
def test_bad_flags_are_said_before_anything_is_measured(name, flags, said, threads, capsys):
    with pytest.raises(SystemExit, match="2"):
        script(name).main(flags.split())
    assert said in capsys.readouterr().err
