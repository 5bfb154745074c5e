"""nativerank report from the command line: where the page lies, what it is made of, and what it refuses."""

import json
import re

import pytest

from nativerank.cli.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prepared):
    """A short run whose ranks change."""
    out = tmp_path_factory.mktemp("trained") / "short"
    flags = f"--model.preset pocket --data.path {prepared} --train.steps 12 --train.context 32 --train.eval_every 6"
    flags += " --train.probe_every 2 --rank.adapt.threshold 0.7 --rank.adapt.every 0.3 --method sct --quiet"
    assert main(["train", *flags.split(), "--out", str(out)]) == 0
    return out


def test_the_page_lies_in_the_run(trained, capsys):
    assert main(["report", str(trained)]) == 0
    assert capsys.readouterr().out.startswith(f"{trained}/report.html  (")
    text = (trained / "report.html").read_text(encoding="utf-8")
    for title in ("Loss", "Orthonormality", "Spectral norms", "Ranks", "Planned and measured"):
        assert f">{title}</h3>" in text
    assert "Planned by the run" in text and "No plan" not in text


def test_counts_of_plan_and_run_agree(trained, tmp_path, capsys):
    assert main(["report", str(trained), "--out", str(tmp_path / "page.html"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (row,) = re.findall(r"<tr><td data-value=\"training FLOPs so far\">.*?</tr>", text)
    planned, measured, ratio = map(float, re.findall(r'data-value="([0-9.e+]+)"', row))
    end = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert measured == pytest.approx(end["train_flops"], rel=1e-5) and ratio == pytest.approx(
        measured / planned, rel=1e-3
    )
    assert measured < planned  # the plan is that of the ranks at the start


def test_two_runs_and_a_folder_of_runs(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in "ab":
        (tmp_path / "runs" / name).symlink_to(trained)
    assert main(["report", "runs/a", "runs/b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == "report.html" and len(found["runs"]) == 2
    assert found["bytes"] == (tmp_path / "report.html").stat().st_size
    assert main(["report", "runs"]) == 0 and (tmp_path / "runs" / "report.html").is_file()


def test_runs_of_one_name_are_told_apart(trained, tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "run").mkdir()
        (tmp_path / name / "run" / "metrics.jsonl").write_bytes((trained / "metrics.jsonl").read_bytes())
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == ["a/run", "b/run"]


def test_a_run_whose_configuration_is_gone_has_no_plan(trained, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes((trained / "metrics.jsonl").read_bytes())
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    assert "No plan: " in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "missing", "no such file or folder"),
        (lambda folder: folder, "holds no run (metrics.jsonl), no comparison (compare.json) and no sweep"),
        (lambda folder: write(folder / "x.json", "{}"), "holds neither a comparison"),
        (lambda folder: write(folder / "x.json", "[1]"), "it lacks everything"),
        (lambda folder: write(folder / "x.json", "{"), "cannot be read"),
        (lambda folder: write(folder / "metrics.jsonl", "{").parent, "holds no rows"),
        (lambda folder: write(folder / "compare.json", '{"arms": []}').parent, "it lacks cells, curves, title"),
    ],
)
def test_what_is_none_of_these_is_one_line(make, words, tmp_path, capsys):
    assert main(["report", str(make(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "report.html").exists()


def write(file, text):
    file.write_text(text)
    return file


def test_a_target_that_cannot_be_is_known_first(trained, tmp_path, capsys):
    assert main(["report", str(trained), "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    assert main(["report", str(trained), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
