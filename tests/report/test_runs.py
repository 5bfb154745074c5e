"""What a run folder says: undone steps do not count, what happened stays, and nothing in a file is trusted."""

import json
import math

import numpy as np
import pytest
from written_runs import MODULES, end, full_rows, start, step_row, write_run

from nativerank.report.runs import number, read_run
from nativerank.report.spectra_charts import place, probed, rank_map, short_name


def test_the_last_row_of_a_step_counts(full_run):
    run = read_run(full_run)
    assert run.axis.tolist() == list(range(1, 401))
    assert run.column("loss")[49] < 9  # the spike at step 50 was undone
    assert [row["event"] for row in run.events] == [
        "loss_spike",
        "gradient_not_finite",
        "ranks",
        "ranks",
        "resume",
    ]
    assert run.state == "finished" and math.isnan(run.column("grad_norm")[59])


def test_a_run_on_its_way_and_one_that_diverged(tmp_path):
    rows = [start(100), *(step_row(s, 100) for s in range(1, 31))]
    assert read_run(write_run(tmp_path / "a", rows)).state == "at step 30 of 100"
    stopped = [*rows, step_row(31, 100, event="loss_spike", action="stop")]
    assert read_run(write_run(tmp_path / "b", stopped)).state == "diverged at step 31"
    again = [*rows, end(30), start(100, event="resume", step=30), step_row(31, 100)]
    assert read_run(write_run(tmp_path / "c", again)).state == "at step 31 of 100"


def test_lines_that_are_no_rows_are_passed_over(tmp_path):
    folder = write_run(tmp_path / "run", full_rows(20))
    file = folder / "metrics.jsonl"
    file.write_text("5\n[1]\nnull\n{broken\n" + file.read_text() + '{"step": 21, "lo')
    run = read_run(folder)
    assert run.last_step == 20 and run.damaged == (4,)  # the last line is one that a crash cut off
    assert run.gaps == "run: 1 line of metrics.jsonl cannot be read and stays out, first line 4."
    assert read_run(write_run(tmp_path / "whole", full_rows(20))).gaps == ""


@pytest.mark.parametrize("content", ["", "\n\n", "{broken\n"])
def test_a_run_without_rows_is_an_error(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match="holds no rows"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("value", "meant"), [(1, 1.0), ("2.5", 2.5), ("inf", math.inf), ("-inf", -math.inf), (None, None), (True, None)]
)
def test_numbers(value, meant):
    found = number(value)
    assert math.isnan(found) if meant is None else found == meant
    assert math.isnan(number("<b>1</b>")) and math.isnan(number({})) and math.isnan(number([1.0]))


@pytest.mark.parametrize(
    ("module", "depth", "kind"),
    [
        ("model.layers.11.self_attn.q_proj", "11", "self_attn.q_proj"),
        ("transformer.h.0.mlp.c_fc", "0", "mlp.c_fc"),
        ("model.layers.3.mlp.experts.2.up_proj", "3", "mlp.experts.2.up_proj"),
        ("proj_in", "-", "proj_in"),
        ("blocks.7", "7", "blocks.7"),
    ],
)
def test_depth_and_kind_of_a_module(module, depth, kind):
    assert place(module) == (depth, kind)
    assert depth in (*short_name(module).split(" "), "-")


def test_ranks_along_the_run(full_run):
    found = rank_map(read_run(full_run))
    assert found.steps == [0, 80, 160] and found.depths == ["0", "1", "2"]
    assert found.kinds == ["self_attn.q_proj", "mlp.up_proj"]
    assert found.values["rank"][0] == [[32, 32, 32], [32, 32, 32]]
    assert found.values["rank"][1] == [[28, 28, 32], [28, 32, 32]]  # the first three of MODULES
    assert found.values["rank"][2] == [[24] * 3] * 2
    energy = found.values["energy kept at the last look"]
    assert energy[0] == [[None] * 3] * 2 and energy[1][1] == [0.97, None, None]


def test_the_first_ranks_follow_from_the_changes_of_an_older_record(tmp_path):
    rows = [{k: v for k, v in row.items() if not (k == "ranks" and row["event"] == "start")} for row in full_rows()]
    assert rank_map(read_run(write_run(tmp_path / "run", rows))).values["rank"][0] == [[32] * 3] * 2


def test_probes_by_matrix(full_run):
    seen = probed(read_run(full_run))
    assert list(seen) == MODULES
    steps, ratios = seen[MODULES[1]]["update_ratio"]
    assert np.array_equal(steps, np.arange(20, 401, 20)) and (ratios == 0.45).all()


def test_hostile_values_in_probes_are_no_numbers(tmp_path):
    rows = [start(2), step_row(1, 2, probes={"a": {"sigma_W": "<script>"}, "b": 3}), step_row(2, 2, probes=[1])]
    run = read_run(write_run(tmp_path / "run", [json.loads(json.dumps(row)) for row in rows]))
    assert probed(run) == {}
