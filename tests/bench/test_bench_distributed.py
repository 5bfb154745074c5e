"""nativerank bench distributed: what is recorded, shown and refused."""

import json
from pathlib import Path

import pytest

from nativerank.bench.distributed import bench_distributed, in_processes
from nativerank.bench.processes import Job, run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--model.preset", "huge"], "unknown preset 'huge'"),
        (["--method", "sgd"], "unknown method 'sgd'"),
        (["--processes", "3"], "8 sequences of demo do not divide among 3 processes"),
        (["--paper", "--model.preset", "pocket", "--shards", "0"], "--shards must be at least 1, got 0"),
        (["--paper", "--model.preset", "huge"], "unknown preset 'huge'"),
    ],
)
def test_bad_input_is_one_line(cli, words, said):
    done = cli("bench", "distributed", *words)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
    assert said in done.err


def test_paper_shows_every_algebra(cli, tmp_path):
    file = tmp_path / "paper.json"
    words = ["bench", "distributed", "--paper", "--model.preset", "pocket", "--replicas", "2", "--shards", "4"]
    done = cli(*words)
    assert done.code == 0 and max(map(len, done.out.splitlines())) <= 80
    assert all(way in done.out for way in ("auto", "gram", "owner", "gather"))
    assert cli(*words, "--method", "sct", "--json", file).code == 0
    (case,) = json.loads(file.read_text())["cases"]
    assert (case["method"], case["replicas"], case["shards"], case["ratio"]) == ("sct", 2, 4, 0.25)
    assert set(case["optimizer"]) == {"auto", "gram", "owner", "gather"}


def test_one_process_is_the_reference(tmp_path):
    (row,) = run(Job(0, 1, str(tmp_path / "store"), "pocket", "spectron", repeats=1))["steps"]
    assert row["mode"] == "none" and len(row["seconds"]["step"]) == 1 and "bytes" not in row


@pytest.mark.slow
def test_a_process_that_fails_is_told(tmp_path):
    with pytest.raises(ValueError, match="process 0 of 1 ended with 1 and said: ValueError: unknown preset 'huge'"):
        in_processes([Job(0, 1, str(tmp_path / "store"), "huge", "spectron", repeats=1)])


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_send_what_was_foretold():
    result = bench_distributed("pocket", processes=[1, 2], repeats=1)
    alone, *others = result["cases"]
    assert [(row["mode"], row["algebra"]) for row in others] == [
        (mode, way) for mode in ("ddp", "fsdp") for way in ("gram", "owner")
    ]
    for row in others:
        assert row["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert row["collectives"]["optimizer"] == 2
        assert row["bytes"]["optimizer"] == pytest.approx(row["foretold"]["optimizer"], rel=1e-3)
        assert 0 <= row["bytes"]["gradients"] - row["foretold"]["gradients"] <= 100  # the loss goes along
    assert len(result["once"]["tasks"]) == 2
    for path in (Path.home(), Path.cwd(), Path(__file__).parents[2]):
        assert str(path) not in json.dumps(result)
