"""Tensors change hands: from the processes that hold pieces of them to those that are to hold other pieces.

    before, after   the pieces (`distributed.pieces`) that every process held, and those that it is to fill
    unit            tensors that are made anew together: one process puts them together, changes them, deals them out

A round serves one unit of each process with two exchanges, so a process has one whole unit in memory at a time and a
model never meets in one place. Tensors that do not change but are held elsewhere afterwards travel the same way; what
stays where it is, stays.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nativerank.distributed.collectives import Kind, exchange
from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import Piece

Whole = dict[str, Tensor]
Change = Callable[[Whole], Whole]


@dataclass(frozen=True)
class Relocation:
    """Parameters (by name) that change together with their state, and what makes new tensors of the old ones."""

    parameters: tuple[str, ...]
    change: Change = lambda whole: whole

    def has(self, name: str) -> bool:
        """Whether a tensor is one of its parameters, or state of one: PARAMETER/STATE."""
        return name in self.parameters or name.rpartition("/")[0] in self.parameters


@dataclass(frozen=True)
class Spot:
    """A piece as other processes know it: `held` of the `shape` of the whole."""

    name: str
    shape: tuple[int, ...]
    held: tuple[int, ...]
    dtype: torch.dtype
    along: int | None
    start: int
    writes: bool

    def of(self, whole: Tensor) -> Tensor:
        """This part of the whole tensor."""
        return whole if self.along is None else whole.narrow(self.along, self.start, self.held[self.along])


Census = list[list[Spot]]  # of every process, by rank


@dataclass(frozen=True)
class Holding:
    """Pieces of this process, and what all processes hold."""

    pieces: dict[str, Piece]
    spots: Census


def held(pieces: Iterable[Piece], grid: Grid) -> Holding:
    """Tells everybody what lies here; every process of the grid calls this."""
    own = {p.name: p for p in pieces}
    mine = [
        Spot(p.name, tuple(p.shape), tuple(p.tensor.shape), p.tensor.dtype, p.along, p.start, p.writes)
        for p in own.values()
    ]
    spots: Census = [[] for _ in range(grid.world)]
    dist.all_gather_object(spots, mine, group=grid.everyone)
    return Holding(own, spots)


@torch.no_grad()
def move(units: Sequence[Relocation], before: Holding, after: Holding, grid: Grid, device: torch.device) -> None:
    """Fills the pieces `after` of these units, and of whatever is held elsewhere than before.

    Args:
        units: the same on every process.
        before, after: of tensors that share no memory where they differ.
        grid: whose processes all call this.
        device: where units are put together and exchanges made.
    """
    shifted = [name for name in _shifted(before.spots, after.spots) if not any(u.has(name) for u in units)]
    also = dict.fromkeys(name.rpartition("/")[0] or name for name in shifted)
    units = [*units, *(Relocation((name,)) for name in also)]
    for first in range(0, len(units), grid.world):
        turn = units[first : first + grid.world]  # the i-th of them is put together by process i
        whole = _gathered(turn, before, grid, device)
        if grid.rank < len(turn):
            whole = turn[grid.rank].change(whole)
        _dealt(turn, whole, after, grid, device)


def _shifted(before: Census, after: Census) -> list[str]:
    """Names of what is held before and after, but not by the same processes in the same way."""

    def places(census: Census) -> dict[str, list[tuple[int, Spot]]]:
        found: dict[str, list[tuple[int, Spot]]] = {}
        for rank, spots in enumerate(census):
            for spot in spots:
                found.setdefault(spot.name, []).append((rank, spot))
        return found

    old, new = places(before), places(after)
    return [name for name in new if name in old and old[name] != new[name]]


def _gathered(turn: Sequence[Relocation], before: Holding, grid: Grid, device: torch.device) -> Whole:
    """The whole tensors of this process's unit."""
    sends = [
        [before.pieces[s.name].tensor.to(device) for s in before.spots[grid.rank] if s.writes and unit.has(s.name)]
        for unit in turn
    ]
    mine = turn[grid.rank].has if grid.rank < len(turn) else lambda name: False
    coming = [[s for s in spots if s.writes and mine(s.name)] for spots in before.spots]
    whole: Whole = {}
    sends += [[] for _ in range(grid.world - len(turn))]
    for spots, tensors in zip(coming, exchange(sends, _kinds(coming), grid.everyone, device), strict=True):
        for spot, tensor in zip(spots, tensors, strict=True):
            if spot.name not in whole:
                whole[spot.name] = torch.zeros(spot.shape, dtype=spot.dtype, device=device)
            spot.of(whole[spot.name]).copy_(tensor)
    return whole


def _dealt(turn: Sequence[Relocation], whole: Whole, after: Holding, grid: Grid, device: torch.device) -> None:
    """Copies what the processes made of their units to everybody's pieces."""
    sends = [[s.of(whole[s.name]).to(device, s.dtype) for s in spots if s.name in whole] for spots in after.spots]
    coming = [[s for s in after.spots[grid.rank] if unit.has(s.name)] for unit in turn]
    coming += [[] for _ in range(grid.world - len(turn))]
    for spots, tensors in zip(coming, exchange(sends, _kinds(coming), grid.everyone, device), strict=True):
        for spot, tensor in zip(spots, tensors, strict=True):
            after.pieces[spot.name].tensor.copy_(tensor)


def _kinds(coming: Census) -> list[list[Kind]]:
    return [[(spot.held, spot.dtype) for spot in spots] for spots in coming]
