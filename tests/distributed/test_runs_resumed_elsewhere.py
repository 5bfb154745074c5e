"""Runs whose checkpoints are written by some processes, in the background, and taken up by others."""

import pytest
import torch
from training_runs import DDP, FSDP, HSDP, weights

from nativerank.train import checkpoint
from nativerank.train.metrics import read_rows

pytestmark = pytest.mark.slow

COMMON = {"train__batch_size": 4, "train__steps": 9, "train__checkpoint_every": 2, "train__eval_every": 0}
ASYNC = {"train__checkpoint_async": True}


@pytest.fixture
def run(train_on):
    """run(world, name, crash_after=None, **changes): the folder of a run that saves often."""
    return lambda world, name, *after, **changes: train_on(world, name, *after, **COMMON | changes)


def losses(folder):
    return {row["step"]: row["loss"] for row in read_rows(folder) if "loss" in row}


@pytest.mark.parametrize("where", [FSDP, DDP])
def test_background_and_resume_change_no_bit_on_as_many_processes(run, where):
    wanted = run(2, "at-once", **where)
    found = run(2, "background", 7, **where, **ASYNC)
    saved = checkpoint.newest_usable(found, print)
    assert saved is not None and saved.step in (4, 6)
    assert len(list(saved.path.iterdir())) == 6
    run(2, "background", **where, **ASYNC, resume="auto")
    assert losses(found) == losses(wanted)
    for name, value in weights(wanted).items():
        assert torch.equal(weights(found)[name], value), name


def test_a_run_goes_from_two_processes_to_four_to_one(run):
    wanted = run(1, "alone")
    found = run(2, "moves", 5, **FSDP, **ASYNC)
    began = checkpoint.newest_usable(found, print).step
    run(4, "moves", 7, **HSDP, **ASYNC, resume="auto")
    assert checkpoint.newest_usable(found, print).step > began
    run(1, "moves", **ASYNC, resume="auto")
    assert losses(found) == pytest.approx(losses(wanted), abs=1e-5)
    for name, value in weights(wanted).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=0, atol=1e-4)
