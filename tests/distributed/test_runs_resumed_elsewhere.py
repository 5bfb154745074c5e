"""Runs whose checkpoints are written by some processes, in the background, and taken up by others."""

import os
import socket

import pytest
import torch
from safetensors.torch import load_file

from nativerank.train import checkpoint
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows

pytestmark = pytest.mark.slow

COMMON = {"train__batch_size": 4, "train__steps": 9, "train__checkpoint_every": 2, "train__eval_every": 0}
FSDP = {"parallel__mode": "fsdp"}
DDP = {"parallel__mode": "ddp"}
HSDP = {"parallel__mode": "hsdp", "parallel__replicas": 2, "parallel__shards": 2}
ASYNC = {"train__checkpoint_async": True}


def worker(rank, world, port, config, listener):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    train(config, listener)


@pytest.fixture
def run(run_config, tmp_path, listen):
    """run(world, name, killed_after=None, **changes): trains; every process ends as after kill -9 if asked to."""

    def start(world, name, killed_after=None, **changes):
        config = run_config(out=tmp_path / name, **COMMON | changes)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        listener = listen(at_step={killed_after: lambda: os._exit(9)})
        context = torch.multiprocessing.start_processes(
            worker, (world, port, config, listener), world, join=False, start_method="fork"
        )
        try:
            while not context.join(timeout=120):
                pass
        except torch.multiprocessing.ProcessExitedException as error:
            assert killed_after is not None and error.exit_code == 9
        return tmp_path / name

    return start


def weights(folder):
    return load_file(folder / "model/model.safetensors")


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
