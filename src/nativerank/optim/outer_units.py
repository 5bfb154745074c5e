"""Which tensors an outer step (`optim.outer`) treats together, who owns them, and which rows of them lie where.

    factor pair (and s)     whole, at one owner
    other tensors           small ones whole; large ones in rows, every process that holds a shard getting a part of it

Owners are chosen alike on all processes: the largest first, each to whoever has least so far.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.distributed.collectives import Kind
from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import bounds, cut_along, local
from nativerank.optim.outer_rules import FRAME, PAIR, PLAIN, TRIPLE, Weights
from nativerank.optim.roles import assign_roles

DEALT_OUT = 1 << 16  # elements; smaller tensors go to one owner


@dataclass(frozen=True)
class OuterUnit:
    """Parameters that are agreed on together, by name; or rows [start, start + length) of one, if length is given."""

    form: str
    name: str
    members: tuple[str, ...]
    owner: int
    start: int = 0
    length: int | None = None


def assigned(model: nn.Module, optimizer: Any, grid: Grid) -> Iterator[OuterUnit]:
    """The units of a model's trainable parameters and their owners."""
    rules = {id(p): group["rule"] for group in optimizer.param_groups for p in group["params"]}
    roles, load, drafts = assign_roles(model), [0] * grid.world, []
    for pair in roles.pairs:
        one_frame = rules[id(pair.up[1])] == "frame-spectron"
        form = TRIPLE if pair.s is not None else FRAME if one_frame else PAIR
        drafts.append((sum(p.numel() for _, p in pair.members), form, pair.name, tuple(n for n, _ in pair.members)))
    for name, p in [*roles.guides, *roles.auxiliary]:
        if p.numel() < DEALT_OUT:
            drafts.append((p.numel(), PLAIN, name, (name,)))
            continue
        for owner, start, length in dealt_rows(p, grid):
            load[owner] += p.numel() * length // p.shape[dealt_along(p)]
            yield OuterUnit(PLAIN, name, (name,), owner, start, length)
    for size, form, name, members in sorted(drafts, key=lambda draft: -draft[0]):
        owner = min(range(grid.world), key=load.__getitem__)
        load[owner] += size
        yield OuterUnit(form, name, members, owner)


def dealt_rows(p: Tensor, grid: Grid) -> Iterator[tuple[int, int, int]]:
    """(owner, first row, rows) of a large tensor: every shard in equal parts for the processes that hold it."""
    for shard in range(grid.shards):
        first, held = bounds(p.shape[dealt_along(p)], grid.shards, shard)
        for replica in range(grid.replicas):
            start, length = bounds(held, grid.replicas, replica)
            if length:
                yield replica * grid.shards + shard, first + start, length


def dealt_along(p: Tensor) -> int:
    """The dimension along which a parameter is cut, the first one where it is whole."""
    return cut_along(p) or 0


def seen(tensors: Sequence[Tensor]) -> Weights:
    """Members as tall matrices, or tall matrices as members: the second one of a pair is stored transposed."""
    return tuple(x.mT if i == 1 else x for i, x in enumerate(tensors))


def wide(x: Tensor) -> torch.dtype:
    """What velocities and changes of basis are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass
class OuterLayout:
    """Where the parameters of a model, which shards of the grid hold as DTensors, lie at this moment.

    `units` are those of all processes by owner, without those whose parameters are gone (guides that have faded).
    """

    grid: Grid
    parameters: dict[str, nn.Parameter]
    units: list[list[OuterUnit]] = field(default_factory=list)

    def where(self, unit: OuterUnit, name: str, shard: int) -> tuple[int | None, int, int]:
        """(dimension, first row, rows) of a member that this shard has; no dimension for a scalar."""
        p = self.parameters[name]
        if p.dim() == 0:
            return None, 0, 1
        dim = dealt_along(p)
        start, length = bounds(p.shape[dim], self.grid.shards, shard)
        if unit.length is None:
            return dim, start, length
        first, end = max(start, unit.start), min(start + length, unit.start + unit.length)
        return dim, first, max(0, end - first)

    def part(self, unit: OuterUnit, name: str) -> Tensor:
        """What of a member lies here, sharing its memory."""
        p, (dim, first, length) = self.parameters[name], self.where(unit, name, self.grid.shard)
        if dim is None:
            return local(p.detach())
        start, _ = bounds(p.shape[dim], self.grid.shards, self.grid.shard)
        return local(p.detach()).narrow(dim, first - start if length else 0, length)

    def part_of(self, unit: OuterUnit, name: str, owned: Tensor, shard: int) -> Tensor:
        """What of the owner's tensor this shard has."""
        dim, first, length = self.where(unit, name, shard)
        return owned if dim is None else owned.narrow(dim, first - unit.start if length else 0, length)

    def kind(self, unit: OuterUnit, name: str, shard: int) -> Kind:
        """(shape, dtype) of the part of a member that this shard has."""
        p, (dim, _, length) = self.parameters[name], self.where(unit, name, shard)
        shape = tuple(p.shape) if dim is None else (*p.shape[:dim], length, *p.shape[dim + 1 :])
        return shape, p.dtype

    def joined(self, unit: OuterUnit, j: int, shards: Sequence[Sequence[Tensor]]) -> Tensor:
        """Member j of the unit from its parts on every shard, in memory of its own."""
        parts = [part[j] for part in shards]
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts, dealt_along(self.parameters[unit.members[j]]))
