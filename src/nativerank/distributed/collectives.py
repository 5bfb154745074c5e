"""Few large collectives instead of many small ones: tensors of any shapes and dtypes travel in one buffer of bytes.

    exchange   every process sends its own list of tensors to every other: one all-to-all
    summed     element by element over all processes: one all-reduce, in the widest dtype among them

Every tensor starts at a multiple of 8 bytes, so what arrives is read in place. Receivers know shapes and dtypes from
the layout that all processes share; nothing but the numbers is sent.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
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


def in_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks (n, ...) as one matrix of bytes (n, B), a row per member: rows for one process are one slice then."""
    n, columns = len(tensors[0]), []
    for t in tensors:
        flat = t.detach().reshape(n, prod(t.shape[1:])).contiguous()
        columns.append(flat.view(torch.uint8) if flat.shape[1] else flat.new_empty(n, 0, dtype=torch.uint8))
        columns.append(flat.new_zeros(n, -columns[-1].shape[1] % ALIGNED, dtype=torch.uint8))
    return torch.cat(columns, 1)


def row_bytes(kinds: Iterable[Kind]) -> int:
    """B of `in_rows`, of stacks whose members have these shapes and dtypes."""
    return sum(padded_bytes(*kind) for kind in kinds)


def from_rows(matrix: Tensor, kinds: Iterable[Kind]) -> list[Tensor]:
    """The inverse of `in_rows`, of bytes (..., B): tensors (..., *shape)."""
    found, start = [], 0
    for shape, dtype in kinds:
        size = prod(shape) * dtype.itemsize
        column = matrix[..., start : start + size].contiguous()
        flat = column.view(dtype) if size else column.new_empty(*matrix.shape[:-1], 0, dtype=dtype)
        found.append(flat.reshape(*matrix.shape[:-1], *shape))
        start += padded_bytes(shape, dtype)
    return found


def _fill(buffer: Tensor, tensors: Iterable[Tensor]) -> None:
    """Writes tensors into a buffer of bytes; neighbours that lie in one stretch of memory each go in at once."""
    waiting: list[Tensor] = []
    start = end = 0
    for t in (t.detach() for t in tensors if t.numel()):
        if not t.is_contiguous():  # straight to its place, without a copy that is contiguous
            buffer[end : end + t.nbytes].view(t.dtype).view(t.shape).copy_(t)
        if waiting and not t.is_contiguous():
            torch.cat(waiting, out=buffer[start:end])
            waiting = []
        if t.is_contiguous():
            start = start if waiting else end
            flat = t.view(-1).view(torch.uint8)
            waiting += [flat, flat.new_zeros(-t.nbytes % ALIGNED)]
        end += padded_bytes(t.shape, t.dtype)
    if waiting:
        torch.cat(waiting, out=buffer[start:end])


def exchange(
    sends: Sequence[Sequence[Tensor]],
    expected: Sequence[Sequence[Kind]],
    group: Group,
    device: torch.device,
) -> list[list[Tensor]]:
    """What every process of the group sent to this one, by its rank.

    Args:
        sends: for each rank the tensors it gets.
        expected: for each rank the (shape, dtype) of what it sends here, in its order.
        group: at least two processes, all of which call this.
        device: where the tensors are, also of a process that sends none: it decides who carries them.
    """
    out_sizes = [row_bytes((t.shape, t.dtype) for t in tensors) for tensors in sends]
    in_sizes = [row_bytes(kinds) for kinds in expected]
    outgoing = torch.empty(sum(out_sizes), dtype=torch.uint8, device=device)
    _fill(outgoing, (t for tensors in sends for t in tensors))
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
