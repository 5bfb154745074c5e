"""The documentation builds strictly: no link leads nowhere, nothing is fetched, every key and command has its place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nativerank
from nativerank.cli.main import COMMANDS
from nativerank.config import RunConfig
from nativerank.schema import keys

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", "HOME": str(out.parent)},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return out


def text(file):
    return file.read_text(encoding="utf-8")


def test_every_page_is_there(site):
    pages = {path.stem for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.stem for path in site.rglob("*.html")}
    assert "natively in low rank" in text(site / "index.html")


def test_every_key_of_the_configuration_is_explained(site):
    page = text(site / "reference" / "configuration.html")
    rows = dict(re.findall(r"<td><code>([a-z0-9_.]+)</code></td>\n<td>.*?</td>\n<td>.*?</td>\n<td>(.*?)</td>", page))
    groups = {key.rpartition(".")[0] for key in keys(RunConfig)}
    expected = {key for key in keys(RunConfig) if key not in groups}
    assert set(rows) == expected
    assert [key for key, meaning in rows.items() if len(meaning) < 5] == []


def test_every_command_and_every_public_name_is_there(site):
    commands = text(site / "reference" / "commands.html")
    for command in COMMANDS:
        assert f">nativerank {command}<" in commands
    api = text(site / "reference" / "api.html")
    for name in (*nativerank.HOMES, "layers.LowRankLinear", "layers.SpectralLinear", "linalg.orthogonalize"):
        assert f"nr.{name}\n" in api or f"nr.{name}<" in api


def test_records_that_pages_link_to_are_copied(site):
    page = text(site / "which-method.html")
    (record,) = set(re.findall(r'href="(files/[^"]*/long-pocket\.json)"', page))
    assert (site / record).read_bytes() == (ROOT / "benchmarks" / "results" / "long-pocket.json").read_bytes()


def test_a_reader_s_browser_fetches_nothing(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|iframe)[^>]*src="(https?:[^"]*)"|<link[^>]*href="(https?:[^"]*)"', text(page)
        )
        assert fetched == [], page
