"""benchmarks/gpu.py: every slice runs on tiny shapes, is kept, and is not measured twice."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(gpu, tmp_path_factory):
    """After a first call that did two slices and a second that did the rest."""
    out = tmp_path_factory.mktemp("gpu")
    assert gpu.main(["--smoke", "--out", str(out), "--only", "layer", "retraction"]) == 0
    assert [case["case"]["slice"] for case in read(out)["cases"]] == ["layer", "retraction"]
    assert gpu.main(["--smoke", "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True, scope="module")
def small_stack():
    """The 70B shapes are for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nativerank.bench.retraction.LAYER_70B", ((2, 40, 4), (1, 60, 4)))
        yield


def read(folder):
    return json.loads((folder / "gpu-smoke.json").read_text())


@pytest.mark.slow
def test_every_slice_is_measured(gpu, folder):
    result = read(folder)
    found = {case["case"]["slice"]: case for case in result["cases"]}
    presets = ("spectron-s", "spectron-m", "spectron-l")
    assert set(found) == {"layer", "retraction"} | {
        f"{what}-{p}" for what in ("memory", "train", "optimizer") for p in presets
    }
    assert {"benchmark", "settings", "environment", "cases", "goals"} == set(result)
    shares = found["optimizer-spectron-m"]["share"]
    for form in ("spectron", "certified", "published", "published, one by one"):
        assert 0 < shares["512k"][form] < shares["32k"][form] < 1
    assert set(found["memory-spectron-l"]["peak_bytes"]) == {"spectron", "lowrank-adamw", "dense-adamw"}
    assert found["train-spectron-l"]["reference"] == "dense-adamw" and found["train-spectron-l"]["mfu"] is None


@pytest.mark.slow
def test_what_is_there_is_not_measured_again(gpu, folder, monkeypatch, capsys):
    before = read(folder)
    monkeypatch.setattr(gpu.Measurement, "fitting", lambda *_: pytest.fail("measured again"))
    assert gpu.main(["--smoke", "--out", str(folder)]) == 0
    assert read(folder) == before
    out = capsys.readouterr().out
    for words in ("retraction of the 70B stack", "spectron-l: spectron, time per token", "certified", "reported"):
        assert words in out


def test_a_batch_that_does_not_fit_is_halved(gpu):
    tried = []

    def measure(preset, batch):
        tried.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("too much")
        return {"preset": preset}

    measurement = gpu.Measurement(torch.device("cpu"), gpu.SMOKE | {"batch": 8})
    assert measurement.fitting(measure, "spectron-s") == {"preset": "spectron-s"} and tried == [8, 4, 2]


def test_a_missed_goal_says_by_how_much(gpu):
    case = {"seconds": {"loop": 1.0, "polar": 0.03}}
    (row,) = gpu.goals({"retraction": case})
    assert (row["met"], row["missed"]) == (False, "missed by 50%")


def test_without_cuda_nothing_is_measured(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_unknown_slice_is_refused(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--smoke", "--out", str(tmp_path), "--only", "everything"])
    assert "no slice everything" in capsys.readouterr().err
