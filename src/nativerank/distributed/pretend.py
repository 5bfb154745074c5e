"""A grid of processes that is not there: this one believes to be one of many, and nobody is on the line.

For figures from shapes: PyTorch wraps, shards and builds as it would, on the meta device.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from nativerank.distributed.grid import Grid, make_grid


@contextmanager
def pretended(replicas: int, shards: int, rank: int = 0) -> Iterator[Grid]:
    """The grid of a process that believes to be one of many.

    Raises:
        ValueError: it is one of several already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a grid that is pretended has no real processes: call this without torchrun")
    dist.init_process_group("fake", rank=rank, world_size=replicas * shards, store=FakeStore())
    try:
        yield make_grid(replicas, shards, "cpu")
    finally:
        dist.destroy_process_group()
