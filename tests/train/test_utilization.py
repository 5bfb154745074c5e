"""MFU: exact FLOPs over the peak of all devices, in every step's row and at the end; nothing where no peak is known."""

from types import SimpleNamespace

import pytest

from nativerank.train import facts, loop
from nativerank.train.metrics import read_rows


def run_on(is_cuda, world):
    parameters = [SimpleNamespace(is_cuda=is_cuda)]
    return SimpleNamespace(
        model=SimpleNamespace(parameters=lambda: iter(parameters)), grid=SimpleNamespace(world=world)
    )


def test_of_all_devices_together(monkeypatch):
    monkeypatch.setattr(facts, "peak_flops", lambda: 1e12)
    assert facts.utilization(run_on(True, 4), 2e12, 1.0) == {"mfu": 0.5}
    assert facts.utilization(run_on(False, 4), 2e12, 1.0) == {}


def test_no_peak_no_figure(monkeypatch):
    monkeypatch.setattr(facts, "peak_flops", lambda: None)
    assert facts.utilization(run_on(True, 1), 2e12, 1.0) == {}


def test_every_step_and_the_end_have_it(tmp_path, run_config, listen, monkeypatch):
    monkeypatch.setattr(loop, "utilization", lambda run, flops, seconds: {"mfu": flops / seconds})
    loop.train(run_config(out=tmp_path / "run", train__steps=3), listen())
    rows = read_rows(tmp_path / "run")
    steps = [row for row in rows if "loss" in row]
    done = [row["mfu"] * row["seconds"] for row in steps]
    assert sum(done) == pytest.approx(steps[-1]["train_flops"])
    assert rows[-1]["mfu"] == pytest.approx(sum(done) / sum(row["seconds"] for row in steps))
