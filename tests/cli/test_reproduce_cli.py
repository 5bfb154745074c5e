"""nativerank reproduce, from the command line: bad input, lists, pages, scales that this machine cannot run."""

import json
import shutil
from pathlib import Path

import pytest

from nativerank.cli.main import main

CARDS = Path(__file__).parents[2] / "reproductions"


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """The cards as committed, in a folder that may be written."""
    shutil.copytree(CARDS, tmp_path / "reproductions")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "reproductions"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["tsdv", "--list"], "did you mean tsvd"),
        (["--scale", "huge"], "--scale is one of pocket, desk, paper"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--cards", "nowhere"], "nowhere holds no card"),
        (["--nothing"], "--nothing"),
        (["--json", "no/such/file.json", "--list"], "no/such"),
    ],
)
def test_bad_input_gets_one_line(cards, capsys, words, named):
    assert main(["reproduce", *words]) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1 and said.startswith("nativerank: error:")


def test_a_list_shows_every_card_and_writes_nothing(cards, capsys):
    before = {file: file.read_bytes() for file in cards.rglob("*") if file.is_file()}
    assert main(["reproduce", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(folder.name in said for folder in cards.iterdir() if folder.is_dir())
    assert max(map(len, said.splitlines())) <= 80
    assert before == {file: file.read_bytes() for file in cards.rglob("*") if file.is_file()}


def test_json_holds_verdicts_and_reasons(cards, capsys):
    assert main(["reproduce", "tsvd", "--list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["tsvd"]
    for claims in found["tsvd"].values():
        assert all(set(entry) == {"verdict", "why"} for entry in claims.values())


def test_pages_are_made_again(cards, capsys):
    page = cards / "tsvd" / "card.md"
    page.unlink()
    assert main(["reproduce", "--render", "--quiet"]) == 0
    assert page.read_bytes() == (CARDS / "tsvd" / "card.md").read_bytes() and capsys.readouterr().out == ""


def test_a_scale_that_needs_a_gpu_is_skipped_without_one(cards, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["reproduce", "tsvd", "--scale", "desk"]) == 0
    assert "needs a GPU and this machine has none: nothing run" in capsys.readouterr().out


def test_out_of_time_is_no_error_and_says_so(cards, capsys):
    assert main(["reproduce", "method-order", "--again", "--minutes", "1e-9"]) == 0
    assert "out of time; the same command goes on" in capsys.readouterr().out
