"""What is read is checked, and whatever is wrong is named by row and column."""

import json
import math

import numpy as np
import pytest
import yaml

from nativerank.config import RankConfig, RunConfig, to_dict
from nativerank.scaling.records import Run, check_units, read_csv, with_budgets
from nativerank.scaling.sources import read_runs

HEADER = "params,tokens,flops,loss"
GOOD = "1e8,2e9,1.2e18,3.1"


@pytest.fixture
def table(tmp_path):
    def write(*lines):
        file = tmp_path / "sweep.csv"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    return write


def test_a_table_becomes_runs(table):
    file = table("loss, flops ,params,tokens,method,rank_ratio,budget", "3.1,1.2e18,1e8,2e9,spectron,0.25,1e18")
    run = read_csv(file)[0]
    assert run == Run(1e8, 2e9, 1.2e18, 3.1, 0.25, "spectron", 1e18, f"{file}, row 2")
    assert run.group == "spectron rho=0.25"
    assert read_csv(table(HEADER, GOOD))[0].group == "all"


def test_a_run_that_diverged_is_a_run(table):
    runs = read_csv(table(HEADER, "1e8,2e9,1.2e18,diverged", "1e8,2e9,1.2e18,inf"))
    assert [run.loss for run in runs] == [math.inf] * 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("params,tokens,loss", "1e8,2e9,3"), "row 1: no column flops; it has params, tokens, loss"),
        (("params,tokens,flops,loss,loss", GOOD + ",3"), "row 1: column loss is there 2 times"),
        ((HEADER, GOOD, "1e8,2e9,1.2e18,"), "row 3, column loss: the cell is empty"),
        ((HEADER, GOOD, "1e8,2e9,1.2e18"), "row 3, column loss: the cell is empty"),
        ((HEADER, GOOD, GOOD, "1e8,two,1.2e18,3"), "row 4, column tokens: 'two' is no number"),
        ((HEADER, "1e8,2e9,1.2e18,nan"), "row 2, column loss: nan is not a finite number above 0"),
        ((HEADER, "-1e8,2e9,1.2e18,3"), "row 2, column params: -1e8 is not a finite number above 0"),
        ((HEADER, GOOD + ",7"), "row 2: it has more cells than the header"),
        ((HEADER, "100,2e9,1.2e18,3"), "row 2, column flops: .* a factor of 1e6: are all of them in ones?"),
        ((HEADER, "1e8,2e9,2.4e18,3"), "row 2, column flops: 2.4e.18 contradicts 6 params tokens = 1.2e.18; .* exact"),
        ((HEADER + ",rank_ratio", GOOD + ",0"), "row 2, column rank_ratio: 0 is not"),
        ((HEADER + ",budget", GOOD + ",1.2"), "row 2, column budget: 1.2 is not what flops says, 1.2e.18"),
        ((HEADER,), "holds no runs below its header"),
        (("",), "row 1: no column params; it has none"),
    ],
)
def test_what_is_wrong_is_named(table, lines, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_csv(table(*lines))
    assert "sweep.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_a_binary_file_is_no_table(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"\xff\xfe\x00\x80" * 9)
    with pytest.raises(ValueError, match="is no CSV file"):
        read_csv(file)


def test_exact_flops_may_differ_from_six_nd_but_not_by_a_thousand():
    check_units(1e6, 1e7, 5 * 6e13, "here", "exact")
    with pytest.raises(ValueError, match="a factor of 1e3"):
        check_units(1e3, 1e7, 6e13, "here", "exact")


def test_budgets_are_neighbours_in_flops():
    flops = np.array([1.0, 1.02, 2.6, 1.01, 2.55]) * 1e18
    runs = with_budgets([Run(1e8, c / 6e8, c, 3.0) for c in flops])
    low, high = float(np.exp(np.log(flops[[0, 1, 3]]).mean())), float(np.exp(np.log(flops[[2, 4]]).mean()))
    assert [run.budget for run in runs] == pytest.approx([low, low, high, low, high])
    given = [Run(1e8, 1.0, 1.0, 3.0, budget=7.0)]
    assert with_budgets(given) == given


@pytest.fixture
def run_folder(tmp_path):
    def write(name, *rows, **config):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(RunConfig(**config))), encoding="utf-8")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return folder

    return write


START = {"event": "start", "step": 0, "parameters": {"total": 2_000_000, "non_embedding": 1_000_000}}
END = {"event": "end", "tokens": 3_000_000, "val_loss": 2.5, "parameters": START["parameters"], "train_flops": 4e13}


def test_run_folders_are_read_by_either_convention(tmp_path, run_folder):
    folder = run_folder("a", START, END, method="spectron")
    run_folder("b", START, {"step": 7, "tokens": 7000, "event": "loss_not_finite", "action": "stop"}, method="spectron")
    first, second = read_runs([tmp_path / "runs"], count="non_embedding")
    assert (first.params, first.tokens, first.flops, first.loss) == (1e6, 3e6, 1.8e13, 2.5)
    assert (first.method, first.source, second.loss) == ("spectron", str(folder), math.inf)
    assert read_runs([folder], "exact")[0].flops == 4e13
    assert read_runs([folder])[0].flops == 3.6e13


def test_run_folders_know_their_ratio_where_it_is_the_rule(run_folder):
    by_ratio = run_folder("a", START, END, method="spectron", rank=RankConfig(ratio=0.4))
    by_value = run_folder("b", START, END, method="spectron", rank=RankConfig(value=16))
    assert [run.rank_ratio for run in read_runs([by_ratio, by_value])] == [0.4, None]
    (by_value / "model").mkdir()
    (by_value / "model" / "config.json").write_text('{"hidden_size": 96}', encoding="utf-8")
    assert read_runs([by_value])[0].rank_ratio == 0.1667


def test_a_run_that_has_not_ended_is_an_error(run_folder):
    with pytest.raises(ValueError, match="has not ended"):
        read_runs([run_folder("a", START, {"step": 1, "tokens": 10, "loss": 3.0})])


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="no such file"):
        read_runs([tmp_path / "none.csv"])
    with pytest.raises(ValueError, match="no runs"):
        read_runs([])
    with pytest.raises(ValueError, match="unknown FLOPs convention '6n'"):
        read_runs([tmp_path], "6n")
