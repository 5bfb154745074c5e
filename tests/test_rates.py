"""The default rates of a swept preset are the best of its committed sweep, and that sweep is complete."""

import json
from pathlib import Path

import pytest

from nativerank.methods import METHODS, SWEPT, Rates, default_rates

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
KEYS = ("optim.lr", "optim.aux_lr", "model.init_scale")


@pytest.mark.parametrize("preset", SWEPT)
def test_defaults_are_the_best_of_the_sweep(preset):
    sweep = json.loads((RESULTS / f"sweep-{preset}.json").read_text())
    assert set(SWEPT[preset]) == set(sweep["best"]) == set(METHODS)
    for method, rates in SWEPT[preset].items():
        cells = [
            cell for cell in sweep["cells"] if cell["method"] == method and cell["seed"] == 0 and "val_loss" in cell
        ]
        best = min(cells, key=lambda cell: cell["val_loss"])
        assert rates == Rates(*(best[key] for key in KEYS))


def test_an_unswept_preset_takes_the_methods_own_rates():
    assert default_rates("spectron", "spectron-l") == METHODS["spectron"].rates
