"""Peaks of fresh processes are those of what was asked for, and the loss is raced in the same shape as all else."""

import json

import pytest

from nativerank.bench import memory
from nativerank.bench.memory import bench_memory


@pytest.fixture
def peaks(monkeypatch):
    """No process: a peak by name, so that what is made of peaks can be told; the jobs that were given out."""
    jobs, values = [], {"spectron+whole": 30, "dense-adamw+whole": 40, "spectron": 10, "dense-adamw": 40}

    def found(job):
        jobs.append(job)
        peak = values[job["name"]] + 2 * sum(one["name"] == job["name"] for one in jobs)
        return {"base_bytes": 5, "peak_bytes": peak, "seconds": 1.0}

    monkeypatch.setattr(memory, "_in_a_process", found)
    return jobs


def test_a_case_for_each_policy_with_medians_beside_the_dense_side(peaks, cli):
    result = cli("bench", "memory", "--policies", "whole", "chunked", "--layers", "2", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    whole, chunked = found["cases"]
    assert [whole["case"]["policy"], chunked["case"]["policy"]] == ["whole", "chunked"]
    assert whole["peak_bytes"] == {"spectron": 34, "dense-adamw": 44} and whole["reference"] == "dense-adamw"
    assert whole["peak_spread"]["spectron"] == [32, 36] and chunked["peak_ratio"]["spectron"] == 14 / 44
    assert [job["name"] for job in peaks[:4]] == [
        "dense-adamw+whole", "spectron+whole", "spectron+whole", "dense-adamw+whole",
    ]  # fmt: skip
    assert {job["layers"] for job in peaks} == {2} and found["settings"]["repeats"] == 3
    assert found["settings"]["policies"] == ["whole", "chunked"] and found["settings"]["device"] == "cpu"
    assert {"processor", "threads", "commit"} <= found["environment"].keys()
    table = cli("bench", "memory", "--policies", "chunked", "--repeats", "1").out
    assert "spectron-s, 4 x 512 tokens" in table and "chunked" in table


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--method", "dense-muon"], "dense-muon"),
        (["--dense_method", "sct"], "sct"),
        (["--policies", "up"], "up is for factors"),
        (["--policies", "most"], "most"),
        (["--batch_size", "0"], "--batch_size"),
        (["--model.preset", "foo"], "unknown preset 'foo'"),
        (["--d_model", "100"], "the width must be a multiple of the preset's head size 64, got 100"),
    ],
)
def test_bad_flags_are_one_line(peaks, cli, flags, named):
    result = cli("bench", "memory", *flags)
    assert result.code == 2 and named in result.err and not peaks


@pytest.mark.slow
def test_a_process_reports_its_peak():
    sizes = dict(layers=1, context=128, batch_size=2, repeats=1)
    result = bench_memory("pocket", policies=["whole", "blocks"], **sizes)
    for case in result["cases"]:
        for name, peak in case["peak_bytes"].items():
            assert peak > case["base_bytes"][name] > 5e7 and case["seconds"][name] > 0


@pytest.mark.slow
def test_a_process_that_fails_is_named():
    with pytest.raises(ValueError, match=r"process that measures spectron\+whole ended with 1"):
        job = {"name": "spectron+whole", "preset": "nothing", "device": "cpu", "d_model": None, "layers": None}
        memory._in_a_process(job)


def test_the_loss_is_raced_against_whole_logits(cli):
    flags = "--model.preset pocket --tokens 40 --chunks 16 --repeats 2 --threads 1"
    result = cli("bench", "loss", *flags.split(), "--json")
    assert result.code == 0, result.err
    (case,) = json.loads(result.out)["cases"]
    assert case["reference"] == "whole" and case["ratio"].keys() == {"whole", "16", "40"} and case["rule"] == 40
    assert (case["case"]["d_model"], case["case"]["vocab_size"]) == (128, 1024)
    assert "vocabulary 1,024" in cli("bench", "loss", *flags.split()).out
    assert cli("bench", "loss", "--tokens", "0").code == 2
