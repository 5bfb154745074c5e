"""The miniature sweep that is committed is the grid that its name says, and docs/scaling.md quotes its fit."""

import json
import re
from pathlib import Path

import pytest

from nativerank.cli.scaling_plan import parse
from nativerank.scaling.cells import plan_cells
from nativerank.scaling.decide import decide
from nativerank.scaling.fit import fit
from nativerank.scaling.sources import read_runs

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "scaling-miniature"


@pytest.fixture(scope="module")
def found():
    complaints = []
    fitted = fit(read_runs([FOLDER], complain=complaints.append))
    assert complaints == []
    return fitted


def test_it_holds_every_cell_of_the_grid():
    rows = {}
    for line in (FOLDER / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["cell"]] = row
    design, _, _ = parse(["--grid", "miniature"])
    for planned in plan_cells(design):
        row = rows[planned.cell.name]
        assert (row["steps"], row["tokens"], row["params"]) == (planned.steps, planned.tokens, planned.params)
        assert row["flops"]["exact"] == pytest.approx(planned.flops["exact"]) and row["threads"] == 1


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_the_page_quotes_the_fit(found):
    """To a unit of the last digit, as another machine may round the other way."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for name in ("dense-muon", "spectron rho=0.25"):
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", page, flags=re.M)
        group = found["groups"][name]
        iso, law = group["isoflop"], group["parametric"]
        quoted = numbers(row)
        assert quoted[0] == group["runs"]
        profiles = iso["profiles"]
        assert quoted[1:7:2] == pytest.approx([profile["params"] / 1e3 for profile in profiles], abs=1)
        assert quoted[2:7:2] == pytest.approx([profile["loss"] for profile in profiles], abs=1e-3)
        exponents = [iso["n_exponent"], *iso["n_interval"], law["n_exponent"], *law["n_interval"]]
        assert quoted[7:] == pytest.approx(exponents, abs=0.01)
    for name in ("spectron rho=0.125", "spectron rho=0.5"):
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", page, flags=re.M)
        group = found["groups"][name]
        minima = [number for p in group["isoflop"]["profiles"] for number in (p["params"] / 1e3, p["loss"])]
        assert numbers(row)[0] == group["runs"]
        assert numbers(row)[1:] == pytest.approx(minima, rel=0.01)
    best = found["surface"]["spectron"]["best"]
    assert "The best ratio is 0.5 at all three budgets" in page and {row["rank_ratio"] for row in best} == {0.5}
    saving = decide(found)["saving"]
    (quoted_saving,) = re.findall(r"by (-?\d+% \(.*?\)) at 9e12", page)
    assert numbers(quoted_saving) == pytest.approx([100 * x for x in (saving["at_budget"], *saving["interval"])], abs=1)
