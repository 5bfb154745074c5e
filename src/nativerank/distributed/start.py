"""From what torchrun put into the environment to a grid of processes, and back.

    mode   grid (replicas x shards) of N processes
    auto   fsdp on CUDA, ddp elsewhere; hsdp where replicas or shards are given
    ddp    N x 1
    fsdp   1 x N
    hsdp   nodes x (processes per node); on a single node 2 x N / 2

The backend is nccl on CUDA (one GPU per process, gloo beside it for what lies in host memory) and gloo elsewhere. One
process needs no process group at all, whatever the mode.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nativerank.distributed.agree import Agreed, fresh_store, launched, together
from nativerank.distributed.grid import SINGLE, Grid, make_grid


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """How many processes this machine runs."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def grid_shape(
    mode: str, replicas: int | None, shards: int | None, world: int, nodes: int = 1, device_type: str = "cpu"
) -> tuple[int, int]:
    """(replicas, shards) of a number of processes.

    Args:
        mode: as in `ParallelConfig`. replicas, shards: None follows from the rest.
        world: processes. nodes: machines.
        device_type: decides what "auto" means.

    Raises:
        ValueError: a mode of one process for many, or numbers that do not make up the processes there are.
    """
    if mode == "none" and world > 1:
        raise ValueError(f"parallel.mode none is one process, but {world} were started")
    if mode == "auto":
        given = replicas is not None or shards is not None
        mode = "hsdp" if given else "fsdp" if device_type == "cuda" else "ddp"
    fixed = {"ddp": (None, 1), "fsdp": (1, None), "hsdp": (None, None), "none": (1, 1)}[mode]
    for key, value, wanted in (("replicas", replicas, fixed[0]), ("shards", shards, fixed[1])):
        if wanted is not None and value not in (None, wanted):
            raise ValueError(f"parallel.{key} is {wanted} in mode {mode}, got {value}")
    replicas, shards = fixed[0] or replicas, fixed[1] or shards
    if world == 1 and replicas is None and shards is None:
        return 1, 1
    for key, value in (("replicas", replicas), ("shards", shards)):
        if value is not None and world % value:
            raise ValueError(f"parallel.{key} {value} does not divide the {world} process{'es' * (world > 1)}")
    if replicas is None:
        replicas = world // shards if shards is not None else nodes if nodes > 1 else 2
    if shards is None:
        shards = max(1, world // replicas)
    if replicas * shards != world:
        raise ValueError(
            f"a grid of {replicas} replicas x {shards} shards has {replicas * shards} processes, but there are "
            f"{world}; see parallel.replicas and parallel.shards"
        )
    return replicas, shards


@contextmanager
def start(
    mode: str = "auto",
    replicas: int | None = None,
    shards: int | None = None,
    device_type: str = "cpu",
    timeout: float = 600.0,
    shared: tuple[type[BaseException], ...] = (Agreed,),
) -> Iterator[Grid]:
    """The grid of this run's processes for the block; `SINGLE`, and nothing else happens, for one process.

    Args:
        mode, replicas, shards: see `grid_shape`.
        device_type: "cuda" or "cpu".
        timeout: as in `watching`; a process that waits in vain for much longer raises.
        shared: as in `watching`.

    Raises:
        ValueError: on every process: a grid that does not match their number, or a process without a GPU of its own.
    """
    rank, world = launched()
    with together():
        shape = grid_shape(mode, replicas, shards, world, world // local_world(), device_type)
        if world > 1:
            check_device(device_type)
    if world == 1:
        yield SINGLE
        return
    where: dict[str, Any] = {"backend": "gloo"}
    if device_type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        where = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    wait = group_timeout(timeout)
    dist.init_process_group(store=fresh_store(), rank=rank, world_size=world, timeout=wait, **where)
    try:
        yield make_grid(*shape, device_type, wait)
    except shared:
        dist.destroy_process_group()
        raise
    except BaseException:
        # Where only this process failed, others are in the middle of something: nccl would wait for them here.
        if device_type != "cuda":
            dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()


def group_timeout(timeout: float) -> timedelta:
    """After which a collective gives up: `watching` ends the run before, and names who is waited for."""
    return timedelta(seconds=2 * timeout + 60)


def check_device(device_type: str) -> None:
    """Raises a ValueError if this process cannot have a device of its own, or PyTorch no backend for it."""
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"many processes train on cuda or cpu, not on {device_type}")
    if device_type == "cuda":
        if not (torch.cuda.is_available() and dist.is_nccl_available()):
            raise ValueError(
                "nccl needs CUDA, which this machine or this PyTorch build does not have; use --device cpu"
            )
        if "LOCAL_RANK" not in os.environ and local_world() > 1:
            raise ValueError(
                "LOCAL_RANK is not set, so this process does not know its GPU; start with torchrun, or set it to the "
                "process's number on its machine"
            )
        if local_rank() >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank()} on this machine has no GPU of its own: {torch.cuda.device_count()} visible "
                f"for {local_world()} processes; lower --nproc-per-node"
            )
