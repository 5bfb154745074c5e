"""The benchmark's two parts: the table of forms, and what two small runs recorded."""

import json
from dataclasses import replace

from nativerank.bench import bound
from nativerank.bench.bound import FORMS, in_training


def test_the_table_has_every_form_and_no_run_when_told_so(cli, monkeypatch):
    monkeypatch.setattr(bound, "SIZES", (5.0,))
    result = cli("bench", "bound", "--no_train")
    assert result.code == 0, result.err
    assert all(form.split(",")[0] in result.out for form in FORMS) and "in training" not in result.out


def test_training_measures_every_matrix_at_every_interval(monkeypatch, run_config):
    run = bound.train
    tiny = run_config(train__steps=9)
    monkeypatch.setattr(
        bound,
        "train",
        lambda c, listener: run(
            replace(c, data=tiny.data, model=tiny.model, train=replace(c.train, context=16)), listener
        ),
    )
    row = in_training("certified", "pocket", 9, 3, 0)
    assert row["measurements"] == 3 * 14 and row["steps"] == 9  # 2 layers of 7 matrices
    assert 0 < row["mean_ratio"] < row["max_ratio"] <= 1 and row["violations"] == 0


def test_bad_input_is_one_line(cli):
    result = cli("bench", "bound", "--probe_every", "0")
    assert (result.code, result.err) == (2, "nativerank: error: --probe_every must be at least 1, got 0\n")
    result = cli("bench", "bound", "--steps", "2")
    assert (result.code, result.err) == (
        2,
        "nativerank: error: --steps 2 ends before the first measurement at step 3\n",
    )


def test_json_is_the_whole_result(cli, monkeypatch):
    monkeypatch.setattr(bound, "SIZES", (5.0,))
    result = cli("bench", "bound", "--no_train", "--json")
    assert {row["form"] for row in json.loads(result.out)["cases"]} == set(FORMS)
