"""Which part of a tensor a process holds.

along None       all of it
along 0, 1 ..    rows [start, start + length) of that dimension, cut as torch.chunk does: ceil(size / shards) each,
                 the last one shorter, some maybe empty
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from nativerank.distributed.grid import Grid


@dataclass(frozen=True)
class Piece:
    """A part of a named tensor in this process's memory.

    Args:
        name: of the whole tensor, as checkpoints have it: PARAMETER, or PARAMETER/STATE of optimizer state.
        tensor: the part, sharing memory with what is trained.
        shape: of the whole.
        along: dimension it is cut along, None for the whole.
        start: its first row there.
        writes: whether it is this process that saves the part; of replicas one does.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    along: int | None = None
    start: int = 0
    writes: bool = True


def bounds(size: int, shards: int, shard: int) -> tuple[int, int]:
    """(start, length) of a shard of `size` rows."""
    each = -(-size // shards)
    start = min(size, each * shard)
    return start, min(size, start + each) - start


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process: itself, or its shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_along(tensor: Tensor) -> int | None:
    """The dimension a parameter is sharded along; None if every process holds all of it."""
    dims = [p.dim for p in tensor.placements if isinstance(p, Shard)] if isinstance(tensor, DTensor) else []
    assert len(dims) <= 1, "sharded along one dimension of the grid at most"
    return dims[0] if dims else None


def piece_of(name: str, tensor: Tensor, grid: Grid) -> Piece:
    """The piece of a parameter or buffer (a DTensor, or the same plain tensor on every process)."""
    along = cut_along(tensor)
    part = local(tensor.detach())
    if along is None:
        return Piece(name, part, tuple(tensor.shape), writes=grid.rank == 0)
    start, length = bounds(tensor.shape[along], grid.shards, grid.shard)
    assert part.shape[along] == length
    return Piece(name, part, tuple(tensor.shape), along, start, writes=grid.replica == 0)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every process: moves it, so not for the hot path."""
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
