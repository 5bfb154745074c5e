"""Processes of a test: forked ones that talk over gloo, without a second import of torch."""

import os
import pickle
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sharded_checkpoints import save_on
from training_runs import Quiet, start_all, train_as

from nativerank.train.loop import train


def _child(rank, function, world, folder, args, port):
    torch.set_num_threads(1)
    if port is None:
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    else:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    try:
        found = ("value", function(rank, *args))
    except BaseException:
        found = ("error", traceback.format_exc())
    (folder / f"rank-{rank}").write_bytes(pickle.dumps(found))
    if found[0] == "error":
        raise SystemExit(1)  # without waiting for the others, who wait for this one
    if dist.is_initialized():
        dist.destroy_process_group()


def _run(function, world, folder, args, port=None):
    context = mp.start_processes(_child, (function, world, folder, args, port), world, join=False, start_method="fork")
    try:
        while not context.join(timeout=60):
            pass
    except mp.ProcessExitedException:
        pass
    found = [pickle.loads(f.read_bytes()) for r in range(world) if (f := folder / f"rank-{r}").exists()]
    for kind, value in found:
        assert kind == "value", value
    assert len(found) == world, "a process ended without a word"
    return [value for _, value in found]


@pytest.fixture
def forked(tmp_path_factory):
    """forked(function, world, *args): function(rank, *args) of every rank, in their order; what one raises is raised.

    Results are pickled, so they are plain values and tensors.
    """
    return lambda function, world, *args: _run(function, world, tmp_path_factory.mktemp("forked"), args)


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """launched(function, world, *args): the same with torchrun's environment, and no process group yet."""

    def run(function, world, *args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return _run(function, world, tmp_path_factory.mktemp("launched"), args, port)

    return run


@pytest.fixture
def saved(forked, tmp_path):
    """saved(replicas, shards): the path of a checkpoint that so many processes wrote."""

    def make(replicas=1, shards=2, **options):
        forked(save_on, replicas * shards, replicas, shards, tmp_path / "run", *options.values())
        return tmp_path / "run/checkpoints/step-000001"

    return make


@pytest.fixture
def train_on(run_config, tmp_path):
    """train_on(world, name, crash_after=None, **changes): the folder of a run; every process dies after that step."""

    def run(world, name, crash_after=None, **changes):
        config = run_config(out=tmp_path / name, **changes)
        if world == 1:
            train(config, Quiet())
            return tmp_path / name
        try:
            start_all(train_as, world, config, Quiet(crash_after))
        except mp.ProcessExitedException as error:
            assert crash_after is not None and error.exit_code == 9
        return tmp_path / name

    return run
