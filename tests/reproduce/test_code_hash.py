"""The hash of the program sees what changes a result, and nothing else."""

import shutil
from pathlib import Path

import pytest

import nativerank
from nativerank.reproduce import code_hash as module
from nativerank.reproduce.card import Experiments, Sweep
from nativerank.reproduce.code_hash import MEASURES, RUNS, SWEEPS, code_hash, meaning

SOURCE = Path(nativerank.__file__).parent


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "nativerank", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "nativerank"


def test_a_comment_a_docstring_and_a_blank_line_are_nothing(copy):
    before = code_hash(None, copy)
    file = copy / "optim" / "rules.py"
    file.write_text(file.read_text().replace('"""', '"""Otherwise said. ', 1) + "\n\n# the end\n")
    module._hash.cache_clear()
    assert code_hash(None, copy) == before


def test_a_changed_number_and_a_new_file_are_something(copy):
    before = code_hash(None, copy)
    file = copy / "methods.py"
    file.write_text(file.read_text().replace("Rates(0.08, 0.01", "Rates(0.09, 0.01", 1))
    module._hash.cache_clear()
    changed = code_hash(None, copy)
    (copy / "linalg" / "more.py").write_text("x = 1\n")
    module._hash.cache_clear()
    assert len({before, changed, code_hash(None, copy)}) == 3


def test_pages_and_progress_are_nothing(copy):
    before = code_hash(None, copy)
    for name in ("report/page.py", "terminal.py", "cli/train.py"):
        (copy / name).write_text((copy / name).read_text() + "\nEXTRA = 1\n")
    module._hash.cache_clear()
    assert code_hash(None, copy) == before


def test_every_pattern_names_a_file():
    assert all(list(SOURCE.glob(pattern)) for pattern in (*RUNS, *MEASURES, *SWEEPS))


def test_meaning_keeps_strings_that_are_no_docstrings():
    assert meaning("x = 'a'") != meaning("x = 'b'")
    assert meaning("def f():\n    'what'\n    return 1") == meaning("def f():\n    return 1  # so")


def test_meaning_sees_indentation():
    assert meaning("if x:\n    y()\n    z()") != meaning("if x:\n    y()\nz()")


def test_a_measure_depends_on_benchmarks_too_and_a_race_does_not(copy):
    race, measure = Experiments(), Experiments(measures={"m": "bench bound"})
    sweep = Experiments(sweeps={"s": Sweep(sizes=[], budgets=[], arms=[])})
    before = [code_hash(kind, copy) for kind in (race, measure, sweep)]
    (copy / "bench" / "bound.py").write_text((copy / "bench" / "bound.py").read_text() + "\nEXTRA = 1\n")
    module._hash.cache_clear()
    after = [code_hash(kind, copy) for kind in (race, measure, sweep)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True] and len(set(before)) == 3
