"""nativerank plan: a table of 80 columns, JSON for programs, one line for bad input."""

import json

import pytest

from nativerank.cli.plan_table import rank_line

TINY = ("--model.preset", "pocket", "--train.steps", "10")
CARD = "card: {memory_gb: 1, bf16_tflops: 10, fp32_tflops: 5, gb_per_second: 100, source: a sheet, price_per_hour: 2}"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    file = tmp_path_factory.mktemp("devices") / "own.yaml"
    file.write_text(CARD)
    return file


def test_the_record(cli, table, tmp_path):
    result = cli("plan", *TINY, "--on", "card", "--table", table, "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert 0 < plan["params"]["non_embedding"] < plan["params"]["total"]
    assert {"per_token", "run", "optimizer_per_step"} <= set(plan["flops"])
    assert {"weights", "gradients", "optimizer", "activations", "peak"} <= set(plan["bytes"])
    assert plan["method"] == "spectron" and plan["dense"]["method"] == "dense-adamw"
    assert plan["dense"]["params"]["total"] > plan["params"]["total"]
    assert plan["fits"] and plan["change"] is None and plan["largest"]["batch_size"] >= 8
    assert plan["time"]["cost"] == pytest.approx(2 * plan["time"]["device_hours"])
    run, token = plan["flops"]["run"], plan["flops"]["per_token"]
    assert run["exact"] == token["exact"] * plan["settings"]["tokens"]
    assert token["6nd"] == 6 * plan["params"]["non_embedding"]
    ratio = plan["time"]["seconds_per_step"] / plan["dense"]["time"]["seconds_per_step"]
    assert bool(plan["will_not_pay"]) == (ratio >= 1) and bool(plan["pays_little"]) == (0.9 < ratio < 1)


def test_the_table_has_80_columns_and_both_conventions(cli, table):
    result = cli("plan", *TINY, "--on", "card", "--table", table, "--price", "3")
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 80
    for word in ("exact", "6ND", "dense-adamw", "peak bytes per process", "cost of the run", "low rank "):
        assert word in result.out


def test_a_dense_run_stands_alone(cli, table):
    result = cli("plan", *TINY, "--method", "dense-muon", "--on", "card", "--table", table, "--json")
    plan = json.loads(result.out)
    assert "dense" not in plan and plan["will_not_pay"] == plan["pays_little"] == [] and "rank" not in plan["largest"]


def test_what_does_not_fit_says_what_to_change(cli, table):
    result = cli("plan", *TINY, "--train.batch_size", "512", "--on", "card", "--table", table, "--json")
    plan = json.loads(result.out)
    assert not plan["fits"] and "activations" in plan["change"] and "train.recompute" in plan["change"]
    assert 0 < plan["largest"]["batch_size"] < 512


def test_the_largest_rank_in_words():
    one = {"rank_key": "rank.ratio", "rank_limit": 1.0}
    said = {rank: rank_line({**one, "rank": rank}) for rank in (0.0, 0.5, 1.0)}
    assert said[0.0] == "no rank.ratio fits at this batch"
    assert said[0.5].endswith(": 0.5") and said[1.0].endswith(": 1.0 (any)")


def test_quiet_prints_nothing(cli, table, tmp_path):
    result = cli("plan", *TINY, "--on", "card", "--table", table, "--quiet", "--json", tmp_path / "plan.json")
    assert (result.code, result.out) == (0, "") and json.loads((tmp_path / "plan.json").read_text())["params"]


def test_the_vocabulary_is_that_of_the_data(cli, table, prepared):
    result = cli("plan", *TINY, "--data.path", prepared, "--on", "card", "--table", table, "--json")
    assert json.loads(result.out)["settings"]["vocabulary"] == 300


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--on", "h20"), "unknown device 'h20'; did you mean h200"),
        (("--on", "h200x-2"), "--on h200x-2: at least one device is needed"),
        (("--price", "nan"), "Expected a float. Got value: nan"),
        (("--quiet",), "--quiet leaves nothing of a plan"),
        (("--on", "h200x0"), "--on h200x0: at least one device is needed"),
        (("--on", "h200", "--price", "-1"), "--price must be positive, got -1.0"),
        (("--on", "h200", "--efficiency", "2"), "--efficiency is a share of the roofline, at most 1, got 2.0"),
        (("--train.stesp", "3"), "unknown config key train.stesp; did you mean train.steps?"),
        (("--on", "h200x3"), "a step's 8 sequences"),
        (("--table", "nowhere.yaml"), "cannot read nowhere.yaml"),
    ],
)
def test_bad_input_is_one_line(cli, words, said):
    result = cli("plan", "--model.preset", "pocket", *words)
    assert (result.code, result.out) == (2, "") and result.err.count("\n") == 1
    assert result.err.startswith("nativerank: error: ") and said in result.err
