"""reproductions/more_text.py: text of packages, once each, in documents of bearable size, with its licence."""

import gzip
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from nativerank.cli.main import main

FILE = Path(__file__).parents[2] / "reproductions" / "more_text.py"


@pytest.fixture(scope="module")
def more_text():
    spec = importlib.util.spec_from_file_location("more_text", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """What a package installs: a manual's source twice, a dictionary, and what is no text."""
    root = tmp_path / "tree"
    doc = root / "usr/share/doc/made-doc"
    (doc / "html/_sources").mkdir(parents=True)
    manual = "".join(f"Section {number}\n\nA ladder has {number} rungs.\n\n" for number in range(300))
    (doc / "html/_sources/manual.rst.txt").write_text(manual)
    (doc / "manual.rst.gz").write_bytes(gzip.compress(manual.encode()))
    (doc / "html/page.html").write_text("<p>A page.</p>")
    (doc / "copyright").write_text("Free.\n")
    dictionary = "".join(f"word{number}\n   A word.\n\n" for number in range(9000))
    (root / "usr/share/dictd").mkdir()
    (root / "usr/share/dictd/made.dict.dz").write_bytes(gzip.compress(dictionary.encode()))
    return root, manual, dictionary


def test_every_text_once_and_in_pieces(more_text, tree):
    root, manual, dictionary = tree
    found = list(more_text.documents(root))
    assert sorted("".join(found)) == sorted(manual + dictionary) and len(found) > 2
    assert all(len(text) < more_text.PIECE + 100 for text in found)
    assert all(text.endswith("\n\n") for text in found)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="packages are Debian's")
def test_a_package_becomes_training_data(more_text, tree, tmp_path, capsys):
    root, manual, dictionary = tree
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text(
        "Package: made-doc\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: made\n"
    )
    deb, out = tmp_path / "made.deb", tmp_path / "texts"
    subprocess.run(["dpkg-deb", "--build", str(root), str(deb)], check=True, capture_output=True)
    assert more_text.unpack("made-doc", deb, out) == len(manual + dictionary)
    assert (out / "made-doc.copyright").read_text() == "Free.\n"
    assert main(["data", "prepare", str(out), "--out", str(tmp_path / "data"), "--tokenizer", "train:300"]) == 0


def test_names_that_carry_a_version(more_text):
    assert more_text.is_version_of("linux-doc-6.1", "linux-doc") and more_text.is_version_of(
        "python3.11-doc", "python3-doc"
    )
    assert not more_text.is_version_of("dictd", "dict-gcide") and not more_text.is_version_of("linux-doc", "linux-doc")


def test_a_package_that_cannot_be_had_is_one_line(more_text, tmp_path, capsys, monkeypatch):
    def refuse(command, cwd=None):
        raise subprocess.CalledProcessError(100, command, stderr="noise\nE: No packages found\n")

    monkeypatch.setattr(more_text, "run", refuse)
    assert more_text.main(["nothing-doc", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "more_text: nothing-doc: E: No packages found\n"
