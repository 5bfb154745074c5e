"""Figures are drawn from records alone, committed ones too, and the same numbers give the same bytes."""

import json
from pathlib import Path

import pytest

from nativerank.report.plots import draw, draw_rates, rate_lines

pytest.importorskip("matplotlib")
SWEEP = Path(__file__).parents[2] / "benchmarks" / "results" / "sweep-pocket.json"


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


def test_equal_numbers_are_equal_bytes(tmp_path):
    files = [draw(record(title="a [b] $c"), folder) for folder in (tmp_path, tmp_path)]
    before = [file.read_bytes() for file in files[0]]
    assert [file.read_bytes() for file in draw(record(title="a [b] $c"), tmp_path)] == before
    assert all(b"<svg" in content for content in before)


def test_committed_sweeps_can_be_drawn(tmp_path):
    lines = rate_lines(json.loads(SWEEP.read_text()))
    assert set(lines) >= {"spectron", "dense-adamw"} and all(len(points) >= 3 for points in lines.values())
    assert draw_rates(lines, tmp_path / "rates.svg", "pocket").stat().st_size > 1000
