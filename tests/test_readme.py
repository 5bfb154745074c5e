"""What the README and docs show is what works: the Python block runs, every command line parses."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from nativerank.cli import convert, scaling
from nativerank.cli.compare import read_request
from nativerank.cli.main import COMMANDS, Parser
from nativerank.cli.train import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]


def commands() -> list[str]:
    """Every line of a page that starts with `nativerank COMMAND`, without comments."""
    lines = [line.strip() for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    return sorted({line for line in lines if re.match(r"nativerank (\w+)", line) and line.split()[1] in COMMANDS})


def test_there_are_commands_to_check():
    assert {line.split()[1] for line in commands()} == set(COMMANDS)


@pytest.mark.parametrize("line", commands())
def test_every_command_shown_parses(line):
    words = shlex.split(line, comments=True)[1:]
    typed = {"train": parse, "compare": read_request, "convert": convert.parse, "scaling": scaling.parse}
    if words[0] in typed:
        typed[words[0]](words[1:])
        return
    parser = Parser()
    importlib.import_module(f"nativerank.cli.{words[0]}").add_parser(parser.add_subparsers(parser_class=Parser))
    assert callable(parser.parse_args(words).run)


def launches() -> list[str]:
    lines = {line.strip() for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()}
    return sorted(line for line in lines if line.startswith("torchrun "))


@pytest.mark.parametrize("line", launches())
def test_every_launch_shown_parses(line):
    launcher = get_args_parser().parse_args(shlex.split(line, comments=True)[1:])
    assert launcher.module and launcher.training_script == "nativerank"
    name, *flags = launcher.training_script_args
    config, _ = parse(flags)
    assert name == "train" and config.out  # which --max-restarts and more than one node need


def test_the_readme_python_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(code.strip().splitlines()) <= 13  # ten lines and the imports
    monkeypatch.chdir(tmp_path)
    scope = {"batches": torch.randint(0, 512, (3, 2, 16))}
    exec(compile(code, "README.md", "exec"), scope)
    assert "rank" in capsys.readouterr().out
    again = scope["nr"].load("my-model")
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, scope["model"].eval()(ids).logits)


def test_no_page_names_a_missing_file():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
