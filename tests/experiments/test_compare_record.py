"""The record and the table of a comparison."""

import json

import pytest

from nativerank.experiments.arms import parse_values
from nativerank.experiments.request import RECORD, TABLE
from nativerank.experiments.search import parse_stages
from nativerank.experiments.table import COLUMNS, render
from nativerank.train.guard import Diverged


def test_failing_and_diverging_cells_do_not_break_the_table(ask, stand_in, tmp_path):
    def loss(settings):
        if settings["method"] == "dense-adamw":
            return 1, "out of memory"
        if settings["optim.lr"] == 0.2:
            return Diverged.exit_code, "step 3: the loss is not finite"
        return float("nan") if settings["optim.lr"] == 0.05 else 3.0

    stand_in.loss = loss
    record = ask("spectron,dense-adamw", seeds=2)
    good, bad = record["arms"]
    assert (good["diverged"], good["failed"], good["n"], good["edges"]) == (4, 0, 2, [])
    assert (bad["n"], bad["mean"], bad["best"], bad["failed"]) == (0, None, None, 6)
    table = (tmp_path / "out" / TABLE).read_text()
    assert "| 4 of 6 |" in table and "no run finished" in table and "6 of 6 cells failed" in table
    rows = [line.count("|") for line in table.splitlines() if line.startswith("|")]
    assert set(rows) == {len(COLUMNS) + 1}
    assert "NaN" not in (tmp_path / "out" / RECORD).read_text()
    # A diverged run is a result; one that failed is tried again.
    stand_in.ran.clear()
    ask("spectron,dense-adamw", seeds=2)
    assert {c["method"] for c in stand_in.ran} == {"dense-adamw"} and len(stand_in.ran) == 6


def test_steps_that_the_guard_refused_are_told(ask, stand_in, tmp_path):
    """From the cell's record, also where a row was written before rows had the number."""

    def rows(settings):
        spike = {"event": "loss_spike", "action": "skip"} if settings["optim.lr"] == 0.2 else {}
        start = {"event": "start", "step": 0, "environment": {"commit": "abc", "machine": "x, 2 cores, 3 threads"}}
        return [start, {"step": 1, "loss": 3.0, "tokens": 1, **spike}, {"step": 2, "loss": 3.0, "tokens": 2, **spike}]

    stand_in.rows = rows
    record = ask("spectron", seeds=2)
    results = tmp_path / "out" / "results.jsonl"
    before = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["settings"]["optim.lr"]: row["refused_steps"] for row in before} == {0.05: 0, 0.1: 0, 0.2: 2}
    old = [{key: row[key] for key in row if key not in ("refused_steps", "commit", "threads")} for row in before]
    results.write_text("".join(json.dumps(row) + "\n" for row in old))
    again = ask("spectron", seeds=2)
    for found in (record, again):
        assert found["arms"][0]["refused_steps"] == [2, 2] and found["arms"][0]["refused_steps_at_best"] == 0
    assert len(record["commits"]) == 1 and again["commits"] == {"abc": 6} and again["cell_threads"] == [3]
    table = (tmp_path / "out" / TABLE).read_text()
    assert "4 steps refused in 2 of 6 cells |" in table and ", 3 threads per run" in table
    stand_in.loss = lambda s: 3.0 - s["optim.lr"]
    results.unlink()
    ask("spectron", seeds=1)
    assert "2 steps refused in 1 of 3 cells, 2 at the best point |" in (tmp_path / "out" / TABLE).read_text()


def test_cells_of_several_commits_are_told_apart(ask, stand_in, tmp_path):
    ask("spectron", seeds=1)
    results = tmp_path / "out" / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert "several commits" not in (tmp_path / "out" / TABLE).read_text()
    results.write_text("".join(json.dumps({**row, "commit": "f" * 40}) + "\n" for row in rows[:1] + rows[2:]))
    record = ask("spectron", seeds=1)
    assert record["commits"]["f" * 40] == 2 and len(record["commits"]) == 2
    said = f"The cells ran at several commits: {'f' * 12} (2 cells), {rows[1]['commit'][:12]} (1 cell)."
    assert said in (tmp_path / "out" / TABLE).read_text()


def test_a_cell_of_two_arms_is_told_as_the_first_ones(ask, stand_in, tmp_path):
    grid = {"optim.lr": parse_values("--lrs", "1x,2x")}
    record = ask("spectron[optim.lr=0.1],spectron[optim.lr=0.2]", grid=grid, seeds=1)
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["settings"]["optim.lr"]: row["arm"] for row in rows} == {
        **dict.fromkeys((0.1, 0.2), "spectron[optim.lr=0.1]"),
        0.4: "spectron[optim.lr=0.2]",
    }
    assert [arm["cells"] for arm in record["arms"]] == [2, 2]


def test_the_record_reads_like_a_committed_sweep(ask, stand_in):
    """`best` and `cells` are what benchmarks/results/sweep-*.json hold and tests/test_rates.py checks."""
    record = ask("spectron", grid={}, stages=parse_stages("lr"), seeds=2)
    point = record["best"]["spectron"]
    cells = [cell for cell in record["cells"] if cell["method"] == "spectron" and cell["seed"] == 0]
    (at_best,) = [cell["val_loss"] for cell in cells if all(cell[key] == point[key] for key in point)]
    assert at_best == min(cell["val_loss"] for cell in cells)


def test_the_curve_is_that_of_the_best_point(ask, stand_in):
    def rows(settings):
        steps = [{"step": n, "tokens": 32 * n, "loss": settings["optim.lr"] + 4 - n / 400} for n in range(1, 401)]
        steps[99]["val_loss"], steps[199]["val_loss"] = "nan", 3.5  # what is not finite is kept as a text
        end = {"event": "end", "step": 400, "tokens": 12800, "val_loss": 3.0}
        return [{"event": "start", "step": 0}, *steps, end]

    stand_in.rows = rows
    record = ask("spectron", seeds=1)
    curve = record["curves"]["spectron"]
    assert len(curve["train"]) <= 60 and curve["train"][-1][0] == 12800
    assert curve["train"][0] == [7 * 32, pytest.approx(0.1 + 4 - 4 / 400)]
    assert curve["validation"] == [[6400, 3.5], [12800, 3.0]]
    assert curve["flops_per_token"] == record["arms"][0]["flops_per_token"]


def test_the_table_ranks_by_mean_within_groups(ask, stand_in):
    record = ask("lowrank-adamw,spectron", seeds=1)
    lines = [line.split(" | ") for line in render(record).splitlines() if line.startswith("| ")]
    assert [words[1] for words in lines[1:]] == ["`spectron`", "`lowrank-adamw`"]
    assert lines[2][13] == "reference" and lines[1][13].startswith("-")
    record["arms"][1]["group"] = "second"
    text = render(record, ["a finding"])
    assert "## second" in text and "- a finding" in text and "Nobody tried several values of optim.aux_lr" in text
