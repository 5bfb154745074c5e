"""The benchmark runs the loop's own step on both sides and adds up what it says."""

import json

import pytest

from nativerank.bench.train import PHASES, bench_train
from nativerank.cli.main import main
from nativerank.models import find_preset, scaled


def test_phases_shares_and_ratio_fit_together():
    result = bench_train("pocket", layers=1, batch_size=2, repeats=3)
    for side in (result["low_rank"], result["dense"]):
        seconds = side["seconds"]
        assert all(seconds[phase] > 0 for phase in PHASES)
        assert side["spread"]["min"] <= seconds["step"] <= side["spread"]["max"]
        assert side["tokens_per_second"] == pytest.approx(2 * 128 / seconds["step"])
        assert side["optimizer_share"] == pytest.approx(seconds["optimizer"] / seconds["step"])
        assert side["probe_share"] == pytest.approx(seconds["probe"] / seconds["step"] / 20) and seconds["probe"] > 0
    low, dense = result["low_rank"]["spread"], result["dense"]["spread"]
    assert dense["min"] / low["max"] <= result["speedup"] <= dense["max"] / low["min"]
    assert result["low_rank"]["parameters"]["non_embedding"] < result["dense"]["parameters"]["non_embedding"]


def test_another_width_keeps_the_proportions():
    demo = find_preset("demo")
    wide = scaled(demo, 512, None)
    assert (wide.d_model, wide.d_ffn, wide.heads, wide.value) == (512, 1408, 8, 128)
    assert wide.d_model // wide.heads == demo.d_model // demo.heads and wide.layers == demo.layers
    with pytest.raises(ValueError, match=r"multiple of the preset's head size 64, got 300"):
        scaled(demo, 300, None)


def test_only_a_low_rank_against_a_dense_method_is_compared():
    with pytest.raises(ValueError, match="got dense-muon and dense-adamw"):
        bench_train("pocket", method="dense-muon")


def test_json_on_stdout_is_json_alone(capsys):
    flags = "--model.preset pocket --layers 1 --batch_size 1 --repeats 1 --json".split()
    assert main(["bench", "train", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["benchmark"] == "train"


@pytest.mark.parametrize("name", ["repeats", "d_model", "layers", "batch_size"])
def test_sizes_below_one_are_one_line(name, capsys):
    assert main(["bench", "train", f"--{name}", "0"]) == 2
    assert capsys.readouterr().err == f"nativerank: error: --{name} must be at least 1, got 0\n"
