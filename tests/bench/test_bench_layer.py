"""One layer against nn.Linear: FLOP shares are the declared ones, and what every record holds."""

import json

import pytest
import torch

from nativerank.bench.layer import bench_layer
from nativerank.bench.record import environment, raced, record

TINY = "--d_in 32 --d_out 48 --rank 8 --tokens 16 --repeats 2"


def test_shares_of_flops_and_time(cli):
    result = cli("bench", "layer", *TINY.split(), "--threads", "1", "2", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert [case["case"]["threads"] for case in found["cases"]] == [1, 2] and torch.get_num_threads() >= 1
    for case in found["cases"]:
        share = 8 * (32 + 48) / (32 * 48)
        assert case["flop_share"] == {"dense": 1, "lowrank": pytest.approx(share), "spectral": pytest.approx(share)}
        for name, over in case["over_flops"].items():
            assert over == pytest.approx(case["ratio"][name] / case["flop_share"][name]) and over > 0
        assert case["case"]["dtype"] == "float32"


def test_the_table_names_what_was_measured(cli):
    out = cli("bench", "layer", *TINY.split(), "--threads", "1").out
    assert all(words in out for words in ("32 -> 48", "1 thread", "lowrank", "spectral", "time / FLOPs"))


def test_the_number_of_threads_comes_back():
    before = torch.get_num_threads()
    bench_layer(8, 8, 2, 4, repeats=1, threads=[2, 1])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ["d_in", "d_out", "rank", "tokens", "repeats", "threads"])
def test_sizes_below_one_are_one_line(name, cli):
    result = cli("bench", "layer", f"--{name}", "0")
    assert (result.code, result.err) == (2, f"nativerank: error: --{name} must be at least 1, got 0\n")


def test_a_rank_beyond_the_shape_is_one_line(cli):
    result = cli("bench", "layer", "--d_in", "8", "--d_out", "16", "--rank", "9")
    assert (result.code, result.err) == (2, "nativerank: error: --rank is at most the smaller side, 8, got 9\n")


def test_a_record_is_what_its_text_says():
    case = raced({"size": 1}, "slow", {"slow": [4.0, 2.0, 3.0], "fast": [1.0, 2.0, 1.0]}, extra=5)
    assert case == {
        "case": {"size": 1},
        "reference": "slow",
        "seconds": {"slow": 3.0, "fast": 1.0},
        "spread": {"slow": [2.0, 4.0], "fast": [1.0, 2.0]},
        "ratio": {"slow": 1.0, "fast": pytest.approx(1 / 3)},
        "extra": 5,
    }
    found = record("some", {"repeats": 3}, [case], torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found and list(found) == ["benchmark", "settings", "environment", "cases"]


def test_the_hardware_is_named():
    found = environment(torch.device("cpu"))
    assert found["processor"] and found["cores"] >= 1 and found["threads"] >= 1 and found["memory_bytes"] > 1 << 28
    assert {"commit", "torch", "transformers", "python", "device", "load_average"} <= set(found)
