"""The default rates of a swept preset are the best of its committed sweep, and that sweep is complete."""

import json
from pathlib import Path

import pytest

from nativerank.methods import METHODS, SWEPT, Rates, default_rates

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
NOISE = 0.02  # nats between single-seed runs; a line search ends at the first point without a better neighbour
FRAMES = ("sct", "tsvd", "stiefel-spectron", "adam-muon")  # searched in the study of that name
KEYS = ("optim.lr", "optim.aux_lr", "model.init_scale")


def committed(preset):
    """What the sweeps of a preset found: one file, one more of each method that came later, and the study of frames."""
    files = [RESULTS / f"sweep-{preset}.json", *sorted(RESULTS.glob(f"sweep-{preset}-*.json"))]
    records = [json.loads(file.read_text()) for file in files]
    best = {method: point for record in records for method, point in record["best"].items()}
    cells = [cell for record in records for cell in record["cells"]]
    if preset == "pocket":
        study = json.loads((RESULTS / "compare-frames.json").read_text())
        searched = {name: next(k for k in study["best"] if k.partition("[")[0] == name) for name in FRAMES}
        best |= {method: study["best"][label] for method, label in searched.items()}
        cells += [
            {**cell, "method": method}
            for method, label in searched.items()
            for cell in study["cells"]
            if cell["method"] == label
        ]
    return {"best": best, "cells": cells}


@pytest.mark.parametrize("preset", SWEPT)
def test_defaults_are_the_best_of_the_sweep(preset):
    sweep = committed(preset)
    assert set(SWEPT[preset]) == set(sweep["best"]) <= set(METHODS)
    for method, rates in SWEPT[preset].items():
        point = sweep["best"][method]
        assert rates == Rates(*(point[key] for key in KEYS))
        cells = [cell for cell in sweep["cells"] if cell["method"] == method and cell["seed"] == 0]
        (at_best,) = [cell["val_loss"] for cell in cells if all(cell[key] == point[key] for key in KEYS)]
        assert at_best <= min(cell.get("val_loss", at_best) for cell in cells) + NOISE
        tried = sorted({cell["optim.lr"] for cell in cells if all(cell[key] == point[key] for key in KEYS[1:])})
        assert tried[0] < point["optim.lr"] < tried[-1], f"{method}: the best rate stands at the edge of its grid"


def test_an_unswept_preset_takes_the_methods_own_rates():
    assert default_rates("spectron", "spectron-l") == METHODS["spectron"].rates
