"""Figures are drawn from records alone, committed ones too, and the same numbers give the same bytes."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from nativerank.experiments.studies import STUDIES
from nativerank.report.plots import STYLES, draw, draw_rates, rate_lines

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "benchmarks" / "results" / "sweep-pocket.json"


def record(**changes):
    best = {"optim.lr": 0.1, "optim.aux_lr": 0.01}
    cells = [{"method": "spectron", **best, "optim.lr": lr, "seed": 0, "val_loss": 3 + lr} for lr in (0.05, 0.1, 0.2)]
    cells += [
        {"method": "spectron", **best, "optim.aux_lr": 0.02, "seed": 0, "val_loss": 3.0},
        {"method": "spectron", **best, "seed": 1, "val_loss": 3.0},
        {"method": "spectron", **best, "optim.lr": 0.4, "seed": 0, "diverged": "x"},
    ]
    curve = {"seed": 0, "flops_per_token": 1e6, "train": [[32, 4.0], [64, 3.5]], "validation": [[64, 3.4]]}
    return {"title": "t", "best": {"spectron": best}, "cells": cells, "curves": {"spectron": curve}, **changes}


def test_a_line_holds_what_differs_from_the_best_in_the_rate_alone():
    assert rate_lines(record()) == {"spectron": [(0.05, 3.05), (0.1, 3.1), (0.2, 3.2)]}


def test_which_figures_there_are(tmp_path):
    assert [file.name for file in draw(record(), tmp_path)] == ["curves.svg", "rates.svg"]
    cells = [cell for cell in record()["cells"] if cell["optim.lr"] == 0.1]
    assert [file.name for file in draw(record(cells=cells, curves={}), tmp_path)] == []
    values = {"steps": [1, 2], "update_norm": [0.1, 0.2], "output_change": [1, 2], "sigma_W": [1, 2]}
    study = {"series": {"spectron": values, "spectron at 5x": values}}
    assert [file.name for file in draw(record(study=study), tmp_path)][-1] == "norms.svg"


def test_figures_of_studies(tmp_path):
    """From what JSON makes of the numbers: texts as keys, null where a run diverged."""
    numbers = {
        "loss_increase": {"spectron": {"0.5x": 0.1, "2x": 0.2}, "lowrank-muon": {"0.5x": None, "2x": None}},
        "without_loss": {"spectron": {}, "lowrank-muon": {"0.5x": "not run", "2x": "diverged 1 of 1"}},
        "best_rate_by_width": {"spectron": {"64": 0.1, "128": 0.05}, "lowrank-adamw": {}},
    }
    study = {"name": "lr-robustness", "numbers": numbers}
    assert [file.name for file in draw(record(study=study), tmp_path)][-1] == "robustness.svg"
    text = (tmp_path / "robustness.svg").read_text()
    assert all(f"<!-- {word} -->" in text for word in ("0.5x", "1x", "2x", "d_model", "128"))
    del numbers["best_rate_by_width"]
    draw(record(study=study), tmp_path)
    assert "<!-- d_model -->" not in (tmp_path / "robustness.svg").read_text()
    numbers = {"32": {"both (spectron)": 3.5, "momentum": 3.7}, "16": {"both (spectron)": 3.6, "momentum": None}}
    drawn = draw(record(study={"name": "ablation", "numbers": numbers}), tmp_path)
    assert [file.name for file in drawn][-1] == "ablation.svg"
    text = (tmp_path / "ablation.svg").read_text()
    assert all(f"<!-- {word} -->" in text for word in ("16", "32", "both (spectron)", "momentum"))
    assert STYLES["spectron"][0] in text


def test_the_figures_of_docs_come_from_the_committed_results(tmp_path):
    figure = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "figure.py")))
    assert set(figure.STORIES) == set(STUDIES)
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir(), docs.mkdir()
    (results / "sweep-pocket.json").write_text(SWEEP.read_text())
    numbers = {"32": {"both (spectron)": 3.5}}
    study = record(study={"name": "ablation", "numbers": numbers})
    (results / "compare-ablation.json").write_text(json.dumps(study))
    (results / "compare-two.json").write_text(json.dumps(record()))
    figure.main(results, docs)
    assert sorted(file.name for file in docs.iterdir()) == [
        *("compare-ablation-ablation.svg", "compare-two-curves.svg", "compare-two-rates.svg", "rates.svg")
    ]


def test_equal_numbers_are_equal_bytes(tmp_path):
    files = [draw(record(title="a [b] $c"), folder) for folder in (tmp_path, tmp_path)]
    before = [file.read_bytes() for file in files[0]]
    assert [file.read_bytes() for file in draw(record(title="a [b] $c"), tmp_path)] == before
    assert all(b"<svg" in content for content in before)


def test_committed_sweeps_can_be_drawn(tmp_path):
    lines = rate_lines(json.loads(SWEEP.read_text()))
    assert set(lines) >= {"spectron", "dense-adamw"} and all(len(points) >= 3 for points in lines.values())
    assert draw_rates(lines, tmp_path / "rates.svg", "pocket").stat().st_size > 1000
