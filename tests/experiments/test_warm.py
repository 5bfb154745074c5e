"""Runs of a grid are forked from a warm process: the same bits, and they end as others do."""

import json
import os
import signal
import threading
import time

import pytest

from nativerank.experiments import processes, warm
from nativerank.experiments.grid import Cell, run_grid

pytestmark = pytest.mark.skipif(not warm.AVAILABLE, reason="forks a process")
TIMES = {"seconds", "peak_memory_bytes"}


@pytest.fixture(scope="module", autouse=True)
def no_warm_process_is_left():
    yield
    processes.IDLE.close()


@pytest.fixture(autouse=True)
def one_environment(monkeypatch):
    """So that the tests share a warm process."""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")


def cells(prepared, count, steps=3):
    small = {"model__preset": "pocket@32x1x2", "data__path": str(prepared), "train__steps": steps}
    return [Cell.of(method="spectron", train__seed=seed, train__eval_every=0, **small) for seed in range(count)]


def test_a_forked_run_is_bit_for_bit_a_fresh_one(prepared, tmp_path, monkeypatch):
    forked = run_grid(cells(prepared, 2), tmp_path / "forked", say=lambda line: None)
    monkeypatch.setattr(processes, "AVAILABLE", False)
    fresh = run_grid(cells(prepared, 2), tmp_path / "fresh", say=lambda line: None)
    for ours, theirs in zip(forked, fresh, strict=True):
        assert ours.keys() == theirs.keys()
        assert {k: v for k, v in ours.items() if k not in TIMES} == {k: v for k, v in theirs.items() if k not in TIMES}


def test_one_warm_process_serves_grid_after_grid(prepared, tmp_path, monkeypatch):
    processes.IDLE.close()
    started = []
    real = warm.Warm.__init__

    def counted(self, environment):
        started.append(environment)
        real(self, environment)

    monkeypatch.setattr(warm.Warm, "__init__", counted)
    for seed, cell in enumerate(cells(prepared, 2)):
        (row,) = run_grid([cell], tmp_path / str(seed), say=lambda line: None)
        assert "val_loss" in row
    assert len(started) == 1


@pytest.fixture
def disturb(monkeypatch):
    """disturb(number, ready): the first run gets this signal once ready() holds."""

    def arrange(number, ready):
        seen = []
        real = processes.Children.__init__

        def act():
            while not (seen[0].running and ready()):
                time.sleep(0.02)
            os.kill(next(iter(seen[0].running)), number)

        def watched(self):
            real(self)
            seen.append(self)
            if len(seen) == 1:
                threading.Thread(target=act).start()

        monkeypatch.setattr(processes.Children, "__init__", watched)

    return arrange


def test_a_run_that_is_killed_failed_and_the_next_one_runs(prepared, tmp_path, disturb):
    disturb(signal.SIGKILL, lambda: True)
    (row,) = run_grid(cells(prepared, 1, 100_000), tmp_path, say=lambda line: None)
    assert row["error"] == "exit code -9"
    (row,) = run_grid(cells(prepared, 1), tmp_path, say=lambda line: None)
    assert "val_loss" in row


def test_a_run_that_is_asked_to_end_saves_its_step_and_goes_on(prepared, tmp_path, disturb):
    (cell,) = cells(prepared, 1, 100)
    run = tmp_path / "grid" / "cells" / cell.name
    metrics = run / "metrics.jsonl"
    disturb(signal.SIGTERM, lambda: metrics.exists() and '"step": 3,' in metrics.read_text())
    (row,) = run_grid([cell], tmp_path / "grid", say=lambda line: None)
    assert "val_loss" not in row and any((run / "checkpoints").iterdir())
    (row,) = run_grid([cell], tmp_path / "grid", say=lambda line: None)
    (whole,) = run_grid([cell], tmp_path / "whole", say=lambda line: None)
    assert row["val_loss"] == whole["val_loss"]


def test_where_the_warm_process_dies_a_fresh_one_runs(prepared, tmp_path, monkeypatch):
    class Dead(warm.Warm):
        def __init__(self, environment):
            super().__init__(environment)
            self.process.kill()

    monkeypatch.setattr(processes, "Warm", Dead)
    (row,) = run_grid(cells(prepared, 1), tmp_path, say=lambda line: None)
    assert "val_loss" in row


def test_errors_of_a_run_are_its_own(tmp_path):
    cell = Cell.of(method="spectron", data__path=str(tmp_path / "nothing"))
    (row,) = run_grid([cell], tmp_path / "grid", say=lambda line: None)
    assert "nothing" in row["error"] and json.dumps(row)
