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
    for form in ("spectron", "certified", "exact", "published", "published, one by one"):
        assert 0 < shares["512k"][form] < shares["32k"][form] < 1
    case = found["optimizer-spectron-m"]
    update = case["seconds"]["spectron"] + case["seconds"]["adamw of the rest"]
    step = update + case["clip_seconds"] + case["pass_seconds"] * 32768 / case["case"]["tokens"]
    assert shares["32k"]["spectron"] == pytest.approx(update / step)
    assert all({"commit", "torch", "device", "measured"} <= set(one["environment"]) for one in found.values())
    assert set(found["memory-spectron-l"]["peak_bytes"]) == {"spectron", "lowrank-adamw", "dense-adamw"}
    assert found["train-spectron-l"]["reference"] == "dense-adamw" and found["train-spectron-l"]["mfu"] is None


@pytest.mark.slow
def test_what_is_there_is_not_measured_again(gpu, folder, monkeypatch, capsys):
    before = read(folder)
    monkeypatch.setattr(gpu.Measurement, "measure", lambda *_: pytest.fail("measured again"))
    assert gpu.main(["--smoke", "--out", str(folder)]) == 0
    assert read(folder) == before
    out = capsys.readouterr().out
    for words in (
        "retraction of the 70B stack",
        "at 32 tokens a step: spectron, time per token",
        "certified",
        "reported",
    ):
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


def test_goals_are_judged_where_they_were_set(gpu):
    """No slower than dense: spectron from spectron-m up. The rest of the figures is reported."""
    case = {
        "case": {"tokens": 16384},
        "reference": "dense-adamw+compile",
        "ratio": {"spectron+compile": 0.9, "lowrank-adamw+compile": 0.7, "dense-adamw+compile": 1.0},
        "flop_share": {"spectron+compile": 0.58},
    }
    rows = gpu.goals({f"train-{preset}": case for preset in gpu.PRESETS})
    judged = [(row["goal"].split(",")[0], row["bound"], row["met"]) for row in rows if row["bound"]]
    assert judged == [("spectron-m", 1.0, True), ("spectron-l", 1.0, True), ("spectron-l", 0.8, False)]
    assert len(rows) == 7 and all("at 16,384 tokens a step" in row["goal"] for row in rows)


@pytest.fixture
def cuda_is_away(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_cuda_nothing_is_measured(gpu, tmp_path, capsys, cuda_is_away):
    assert gpu.main(["--out", str(tmp_path / "new")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_without_cuda_slices_are_listed(gpu, capsys, cuda_is_away):
    assert gpu.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(gpu.SLICES) and len(gpu.SLICES) == 11


@pytest.mark.parametrize("smoke", [[], ["--smoke"]])
def test_an_unknown_slice_is_refused(gpu, tmp_path, capsys, cuda_is_away, smoke):
    with pytest.raises(SystemExit, match="2"):
        gpu.main([*smoke, "--out", str(tmp_path), "--only", "everything"])
    said = capsys.readouterr()
    assert "no slice everything; there are layer, retraction, memory-spectron-s" in said.err and not said.out
    assert len(said.err.splitlines()) == 1


@pytest.fixture
def measured(gpu, monkeypatch):
    """No slice measures anything; the names of those that were asked for. Two fail at first."""
    names, failing = (
        [],
        {"retraction": RuntimeError("out of\nluck"), "train-spectron-s": torch.OutOfMemoryError("full")},
    )

    def measure(self, name):
        names.append(name)
        if error := failing.pop(name, None):
            raise error
        if name == "retraction":
            return {"case": {"slice": name}, "seconds": {"loop": 1.0, "polar": 0.01}}
        numbers = {"reference": "d", "ratio": {}, "share": {"32k": {}, "512k": {}}}
        return {"case": {"slice": name, "tokens": 32}, **numbers}

    monkeypatch.setattr(gpu.Measurement, "measure", measure)
    return names


def test_a_slice_that_fails_is_said_and_tried_again(gpu, tmp_path, capsys, measured):
    """The others go on, in a folder that is made."""
    out = tmp_path / "some" / "folder"
    assert gpu.main(["--smoke", "--out", str(out)]) == 1
    assert measured == list(gpu.SLICES)
    said = capsys.readouterr()
    assert "retraction failed: RuntimeError: out of luck" in said.out and "Traceback" in said.err
    assert said.out.splitlines()[-1] == "failed, tried again by the next call: retraction train-spectron-s"
    assert {case["case"]["slice"] for case in read(out)["cases"]} == set(gpu.SLICES) - {
        "retraction",
        "train-spectron-s",
    }
    measured.clear()
    assert gpu.main(["--smoke", "--out", str(out)]) == 0
    assert measured == ["retraction", "train-spectron-s"] and len(read(out)["cases"]) == 11
    measured.clear()
    assert gpu.main(["--smoke", "--out", str(out), "--only", "layer"]) == 0 and measured == ["layer"]


def test_the_folder_is_refused_before_anything_is_measured(gpu, tmp_path, capsys, measured):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--smoke", "--out", str(tmp_path / "file")])
    assert str(tmp_path / "file") in capsys.readouterr().err and not measured


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"benchmark": "gpu", "cases": [{"ca', "is no record of this script"),
        ("[]", "is no record of this script"),
        ('{"settings": {"batch": 1}, "cases": []}', "holds slices of other sizes"),
    ],
)
def test_a_torn_or_foreign_file_is_named(gpu, tmp_path, capsys, measured, text, said):
    file = tmp_path / "gpu-smoke.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--smoke", "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert f"{file} {said}" in err and len(err.splitlines()) == 1 and not measured and file.read_text() == text
