"""Few large collectives instead of many small ones: tensors of any shapes and dtypes travel in one buffer of bytes.

    exchange   every process sends its own list of tensors to every other: one all-to-all
    summed     element by element over all processes: one all-reduce, in the widest dtype among them

Every tensor starts at a multiple of 8 bytes, so what arrives is read in place. Receivers know shapes and dtypes from
the layout that all processes share; nothing but the numbers is sent.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from nativerank.distributed.grid import Group

ALIGNED = 8  # bytes
Kind = tuple[tuple[int, ...], torch.dtype]


def padded_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """What a tensor takes in a buffer."""
    return -(-prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED


@lru_cache(maxsize=8)
def _zeros(device: torch.device) -> Tensor:
    return torch.zeros(ALIGNED, dtype=torch.uint8, device=device)


def _as_bytes(tensors: Iterable[Tensor]) -> list[Tensor]:
    parts = []
    for t in tensors:
        if t.numel():
            flat = t.detach().contiguous().view(-1).view(torch.uint8)
            parts.append(flat)
            if rest := flat.numel() % ALIGNED:
                parts.append(_zeros(t.device)[rest:])
    return parts


def exchange(
    sends: Sequence[Sequence[Tensor]],
    expected: Sequence[Sequence[Kind]],
    group: Group,
    device: torch.device | None = None,
) -> list[list[Tensor]]:
    """What every process of the group sent to this one, by its rank.

    Args:
        sends: for each rank the tensors it gets.
        expected: for each rank the (shape, dtype) of what it sends here, in its order.
        group: at least two processes, all of which call this.
        device: where the tensors are; None asks them, so every process has to send some then.
    """
    device = device or next((t.device for part in sends for t in part), torch.device("cpu"))
    parts = [_as_bytes(tensors) for tensors in sends]
    out_sizes = [sum(p.numel() for p in part) for part in parts]
    in_sizes = [sum(padded_bytes(*kind) for kind in kinds) for kinds in expected]
    flat = [p for part in parts for p in part]
    outgoing = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)
    incoming = torch.empty(sum(in_sizes), dtype=torch.uint8, device=device)
    dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=group)
    found: list[list[Tensor]] = []
    start = 0
    for kinds in expected:
        found.append([])
        for shape, dtype in kinds:
            piece = incoming[start : start + prod(shape) * dtype.itemsize]
            found[-1].append(piece.view(dtype).view(shape) if piece.numel() else piece.new_empty(shape, dtype=dtype))
            start += padded_bytes(shape, dtype)
    return found


def summed(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """The sums of equal-shaped tensors over the processes of the group, in their own dtypes."""
    if not tensors:
        return []
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]
