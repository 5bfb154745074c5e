"""The loss and the gradient norm of a step on many processes: one all-reduce, the same bits everywhere.

    loss    mean of the processes' means (each takes part with as many tokens)
    norm    sqrt of the sum of squares over the shards of one replica; a replica of whole gradients is one process

The first replica's shards say the norm, which is the same in all; replicas whose gradients differ on purpose each fill
a place of their own.

The same all-reduce tells whether all processes have gradients of the same parameters, without which the optimizer's
exchanges hang or mix up weights: of the processes' numbers for what they lack, m_i, it adds up m_i and m_i^2, and
N sum m_i^2 = (sum m_i)^2 only if all are equal. Two more numbers, and nothing else while all agree. Where the engine's
own exchange, in the backward pass, waits for ever because of it (parts of unequal size, say), `watching` ends the run.
"""

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nativerank.distributed.agree import Agreed, totals
from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import local

MARKS = 1 << 20  # of lists of parameters: small enough for sums of squares over 8192 processes to be exact in float64


def loss_and_norms(
    loss: Tensor,
    parameters: Iterable[tuple[str, Tensor]],
    grid: Grid,
    votes: Sequence[float | Tensor] = (),
    apart: bool = False,
) -> tuple[float, list[float], list[float]]:
    """(mean loss, gradient norm, or that of each replica, sums of the votes).

    Args:
        loss: of this process, a scalar.
        parameters: by name, with their gradients, sharded along the grid's shards or whole.
        grid: of all processes.
        votes: numbers, or scalars on the device, to be summed on the way.
        apart: replicas keep gradients of their own.

    Raises:
        Agreed: on every process: one has a gradient where another has none.
    """
    named = list(parameters)
    lacking = [name for name, p in named if p.requires_grad and p.grad is None]
    mark = mark_of(lacking)
    places: list[float | Tensor] = [0.0] * (grid.replicas if apart else 1)
    if apart or grid.replica == 0:
        own = torch.nn.utils.get_total_norm(local_gradients(p for _, p in named))
        places[grid.replica if apart else 0] = own.double().square()
    value, marks, squared, *sums = totals([loss, mark, mark**2, *places, *votes], grid, loss.device)
    if grid.world * int(squared) != int(marks) ** 2:
        raise_difference(lacking, grid)
    squares, counted = sums[: len(places)], sums[len(places) :]
    return value / grid.world, [math.sqrt(s) if s >= 0 else s for s in squares], counted


def mark_of(lacking: Sequence[str]) -> int:
    """A number below MARKS for a list of names, 0 for none: two lists have the same one in a million."""
    return 1 + zlib.crc32("\n".join(lacking).encode()) % (MARKS - 1) if lacking else 0


def raise_difference(lacking: Sequence[str], grid: Grid) -> None:
    """Finds out which process has no gradient of which parameter that another one has.

    Raises:
        Agreed: on all of them, naming both.
    """
    lists: list[Any] = [None] * grid.world
    dist.all_gather_object(lists, lacking, group=grid.everyone)
    name = min(set().union(*lists).difference(set(lists[0]).intersection(*lists)))
    without = [rank for rank, names in enumerate(lists) if name in names]
    having = next(rank for rank in range(grid.world) if rank not in without)
    raise Agreed(
        f"rank {without[0]} has no gradient of {name.removeprefix('module.')}, which rank {having} has; all processes "
        "must use the same parameters in a step",
        silent=grid.rank != 0,
    )


def clip(parameters: Iterable[Tensor], norm: float, largest: float) -> None:
    """Shortens gradients whose norm is beyond the largest one, as `torch.nn.utils.clip_grad_norm_` does.

    That multiplies by 1 where there is nothing to shorten, which is one more pass over all gradients than is needed.
    """
    factor = largest / (norm + 1e-6)
    if not factor >= 1:  # so that one which is not a number shows in the gradients
        torch._foreach_mul_(local_gradients(parameters), factor)


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """What of the gradients lies in this process."""
    return [local(p.grad) for p in parameters if p.grad is not None]
