"""A package that is missing is one sentence that says how to get it."""

import sys

import pytest

from nativerank.extras import require


def test_what_is_there_is_imported():
    assert require("json.decoder", "gguf", "this") is sys.modules["json.decoder"]


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part"])
def test_what_is_missing_is_said(module):
    with pytest.raises(ValueError, match=r"^--format gguf needs the extra `gguf`: pip install 'nativerank\[gguf\]'$"):
        require(module, "gguf", "--format gguf")


def test_a_package_that_lacks_something_itself_says_so(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        require("half_there", "gguf", "this")


def test_under_ci_a_missing_package_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    for ci, kind in (("", pytest.skip.Exception), ("true", ImportError)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(kind):
            pytest.importorskip("gguf")
        with pytest.raises(pytest.skip.Exception):
            pytest.importorskip("torchtitan")
