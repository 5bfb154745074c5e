"""The loss and the gradient norm of a step on many processes: one all-reduce, the same bits everywhere.

    loss    mean of the processes' means (each takes part with as many tokens)
    norm    sqrt of the sum of squares over the shards of one replica; a replica of whole gradients is one process

The first replica's shards say the norm, which is the same in all; replicas whose gradients differ on purpose each fill
a place of their own.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nativerank.distributed.agree import totals
from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import local


def loss_and_norms(
    loss: Tensor, parameters: Iterable[Tensor], grid: Grid, votes: Sequence[float] = (), apart: bool = False
) -> tuple[float, list[float], list[float]]:
    """(mean loss, gradient norm, or that of each replica, sums of the votes).

    Args:
        loss: of this process, a scalar.
        parameters: with their gradients, sharded along the grid's shards or whole.
        grid: of all processes.
        votes: numbers to be summed on the way.
        apart: replicas keep gradients of their own.
    """
    places: list[float | Tensor] = [0.0] * (grid.replicas if apart else 1)
    if apart or grid.replica == 0:
        own = torch.nn.utils.get_total_norm(local_gradients(parameters))
        places[grid.replica if apart else 0] = own.double().square()
    value, *sums = totals([loss, *places, *votes], grid, loss.device)
    squares, counted = sums[: len(places)], sums[len(places) :]
    return value / grid.world, [math.sqrt(s) if s >= 0 else s for s in squares], counted


def clip(parameters: Iterable[Tensor], norm: float, largest: float) -> None:
    """Shortens gradients whose norm is beyond the largest one, as `torch.nn.utils.clip_grad_norm_` does."""
    factor = largest / (norm + 1e-6)
    if not factor >= 1:  # so that one which is not a number shows in the gradients
        torch._foreach_mul_(local_gradients(parameters), factor)


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """What of the gradients lies in this process."""
    return [local(p.grad) for p in parameters if p.grad is not None]
