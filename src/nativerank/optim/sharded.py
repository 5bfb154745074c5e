"""One step of units that are spread over processes: everybody's parts to the owners, results back.

    in     gram: partial sums of this process's rows           owner: gradient shards, of this replica's units
    there  totals -> `solve`, once per unit                    whole gradient -> the ordinary rule on a whole copy
    out    what `solve` returned, to everybody                 shards of the new weights, to whoever holds them

All units travel together, so a step takes two exchanges however many units, shapes and algebras there are, and one
all-reduce more where a gram rule asks for sums first (tsvd, and `riemannian`). Where a process adds up what came from
the others it does so in one order, so all bits are functions of the grid.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nativerank.distributed.collectives import Kind, exchange, from_rows, in_rows, row_bytes, summed
from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import bounds, cut_along, local
from nativerank.linalg.gram import to_float64
from nativerank.linalg.roots import triangular_inverse
from nativerank.optim.ask import Answer, Part, packed, unpacked, upper
from nativerank.optim.rows import Rows, Running, start
from nativerank.optim.units import GRAM, OWNER, Unit

Sends = list[list[Tensor]]
Expected = list[list[Kind]]
Arrived = list[Iterator[Tensor]]


class Sharded:
    """The exchanges of an optimizer's steps.

    Args:
        grid: of at least two processes.
        units: of the matrix groups, with algebra and owner.
    """

    def __init__(self, grid: Grid, units: Sequence[Unit]):
        self.grid, self.units = grid, list(units)
        self.device = units[0].members[0].device if units else torch.device("cpu")
        self.kept: dict[int, Tensor] = {}  # by the parameter's id: whole copies of own units, and s of gram units
        for unit in self.units:
            for position, p in enumerate(unit.members):
                copied = unit.algebra == OWNER and self.owns(unit) and is_cut(p)
                if copied or (unit.algebra == GRAM and position == 2):
                    self.kept[id(p)] = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
        self.stale = True  # the copies are not the weights yet

    def owns(self, unit: Unit) -> bool:
        """Whether this process solves the unit."""
        return unit.owner == self.grid.rank

    def seat(self, unit: Unit, position: int) -> Tensor:
        """The plain tensor that is updated here for a member: its rows, a whole copy, or the parameter itself."""
        p = unit.members[position]
        return local(p.detach()) if unit.algebra == GRAM and position < 2 else self.kept.get(id(p), p)

    @torch.no_grad()
    def step(self, rows: Sequence[Rows], groups: Sequence[dict[str, Any]], update: Callable[[], None]) -> None:
        """Updates every unit whose members all have gradients.

        Args:
            rows: the gram units. groups: of the optimizer. update: runs the ordinary rules on the owned units.
        """
        if self.stale:
            self.refresh(rows)
        active = [u for u in self.units if u.algebra == OWNER and all(p.grad is not None for p in u.members)]
        started = [self._start(r, groups[r.units[0].group]) for r in rows]
        running = [run for run in started if run is not None]
        self._sum_up(running)
        answers = self._in(running, active)
        update()
        self._out(running, answers, active)
        for kept in self.kept.values():
            kept.grad = None

    @torch.no_grad()
    def refresh(self, rows: Sequence[Rows]) -> None:
        """Takes up weights and state that others have written: whole copies, and inverses that only owners can know."""
        owned = [u for u in self.units if u.algebra == OWNER]
        sends, expected = self._nothing(), self._nothing()
        self._shards_in(sends, expected, owned, lambda p: p.detach())
        arrived = [iter(found) for found in exchange(sends, expected, self.grid.everyone, self.device)]
        for p, weight in self._assembled(arrived, owned, lambda p: p.detach()):
            self.kept[id(p)].copy_(weight)
        for r in rows:
            for small, state in zip(r.small, r.bucket.states, strict=True):
                if "R_inverse" in state:
                    self._tell_inverse(r, small["R"], state["R_inverse"])
        self.stale = False

    # -- rows -----------------------------------------------------------------------------------------------------

    def _start(self, rows: Rows, options: dict[str, Any]) -> Running | None:
        for j, side in enumerate(rows.bucket.sides):
            for i, unit in enumerate(rows.units):
                side[i] = self._seated(unit, j)
        if is_cut(rows.units[0].members[0]):
            return start(rows, options, self.grid.replica, self.grid.replicas)
        return start(rows, options, self.grid.rank, self.grid.world)

    def _seated(self, unit: Unit, position: int) -> Tensor:
        """A member's seat with its gradient: rows, or of s what this process contributes to sums."""
        p, seat = unit.members[position], self.seat(unit, position)
        grad = None if p.grad is None else local(p.grad)
        if position == 2:
            seat.copy_(self._contribution(p, local(p.detach())))
            grad = None if grad is None else self._contribution(p, grad)
        seat.grad = grad
        return seat

    def _contribution(self, p: Tensor, held: Tensor) -> Tensor:
        """A vector that is zero but where this process is the one to say what it is."""
        out = torch.zeros(p.shape, dtype=held.dtype, device=held.device)
        if not is_cut(p):
            return out.copy_(held) if self.grid.rank == 0 else out
        if self.grid.replica == 0:
            out.narrow(0, *bounds(p.shape[0], self.grid.shards, self.grid.shard)).copy_(held)
        return out

    def _sum_up(self, running: list[Running]) -> None:
        """Answers what asks for sums alone, all of it in one all-reduce."""
        while asking := [run for run in running if run.ask.solve is None]:
            parts = [part for run in asking for part in run.ask.parts.values()]
            totals = iter(summed([packed(part) for part in parts], self.grid.everyone))
            for run in asking:
                run.go_on({name: unpacked(next(totals), part.form) for name, part in run.ask.parts.items()})

    def _tell_inverse(self, rows: Rows, R: Tensor, R_inverse: Tensor) -> None:
        """Fills R^-1 (n, r, r) on every process from the owners' R (m, r, r)."""
        mine = packed(upper(triangular_inverse(to_float64(R)).to(R.dtype)))  # to the bit what a step would have told
        owners = [unit.owner for unit in rows.units]
        expected = [[((owners.count(rank), *mine.shape[1:]), mine.dtype)] for rank in range(self.grid.world)]
        found = exchange([[mine]] * self.grid.world, expected, self.grid.everyone, self.device)
        R_inverse.copy_(unpacked(torch.cat([inverse for (inverse,) in found]), "upper"))

    # -- to the owners and back -----------------------------------------------------------------------------------

    def _in(self, running: list[Running], active: list[Unit]) -> list[Mapping[str, Part]]:
        """Sends parts and gradients to the owners; solves here what is to be solved here."""
        sends, expected = self._nothing(), self._nothing()
        kinds = []
        for run in running:
            flat = [packed(part) for part in run.ask.parts.values()]
            kinds.append([(tuple(x.shape[1:]), x.dtype) for x in flat])
            counts = run.counts(self.grid.world)
            for rank, rows in enumerate(in_rows(flat).split(counts)):
                sends[rank].append(rows)
                expected[rank].append(((counts[self.grid.rank], row_bytes(kinds[-1])), torch.uint8))
        self._shards_in(sends, expected, active, lambda p: p.grad)
        arrived = [iter(found) for found in exchange(sends, expected, self.grid.everyone, self.device)]
        answers = []
        for run, these in zip(running, kinds, strict=True):
            sums = (x.sum(0) for x in from_rows(torch.stack([next(found) for found in arrived]), these))
            answers.append(run.solve({k: unpacked(next(sums), part.form) for k, part in run.ask.parts.items()}))
        for p, grad in self._assembled(arrived, active, lambda p: p.grad):
            self.kept[id(p)].grad = grad
        return answers

    def _out(self, running: list[Running], answers: list[Mapping[str, Part]], active: list[Unit]) -> None:
        """Sends answers and new weights to whoever needs them; ends the step of the gram rules."""
        sends, expected = self._nothing(), self._nothing()
        kinds = []
        for run, answer in zip(running, answers, strict=True):
            flat = [packed(part) for part in answer.values()]
            kinds.append([(tuple(x.shape[1:]), x.dtype) for x in flat])
            rows = in_rows(flat) if flat else None
            for rank, count in enumerate(run.counts(self.grid.world)):
                if rows is not None:
                    sends[rank].append(rows)
                    expected[rank].append(((count, rows.shape[1]), torch.uint8))
        self._shards_out(sends, expected, active)
        arrived = [iter(found) for found in exchange(sends, expected, self.grid.everyone, self.device)]
        for run, answer, these in zip(running, answers, kinds, strict=True):
            told: Answer = {}
            if answer:
                everything = iter(from_rows(torch.cat([next(found) for found in arrived]), these))
                told = {name: unpacked(next(everything), part.form) for name, part in answer.items()}
            run.end(told)
            for i in run.rows.bucket.active if len(run.rows.bucket.sides) > 2 else ():
                self._take(run.rows.units[i].members[2], run.rows.bucket.sides[2][i])
        for unit in active:
            for position, p in enumerate(unit.members):
                if not self.owns(unit):
                    local(p.detach()).copy_(next(arrived[unit.owner]))
                elif is_cut(p):
                    self._take(p, self.seat(unit, position))

    def _shards_in(self, sends: Sends, expected: Expected, units: list[Unit], what: Callable[[Tensor], Any]) -> None:
        """Adds the shards of units (`what` of each member) that travel to their owners, each inside its replica."""
        for unit in units:
            for p in filter(is_cut, unit.members):
                if self.owns(unit):
                    for rank in self._row(unit.owner):
                        if rank != unit.owner:
                            expected[rank].append((self._shape(p, rank), p.dtype))
                elif self.grid.rank in self._row(unit.owner):
                    sends[unit.owner].append(local(what(p)))

    def _assembled(
        self, arrived: Arrived, units: list[Unit], what: Callable[[Tensor], Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(member, the whole of it) of own units that are cut."""
        for unit in filter(self.owns, units):
            for p in filter(is_cut, unit.members):
                own = local(what(p))
                parts = [own if rank == unit.owner else next(arrived[rank]) for rank in self._row(unit.owner)]
                yield p, torch.cat(parts, cut_along(p) or 0)

    def _shards_out(self, sends: Sends, expected: Expected, units: list[Unit]) -> None:
        """Adds what every other process holds of the owned units, as the owner has it now."""
        for unit in units:
            for position, p in enumerate(unit.members):
                if not self.owns(unit):
                    expected[unit.owner].append((self._shape(p, self.grid.rank), p.dtype))
                    continue
                for rank in range(self.grid.world):
                    if rank != unit.owner:
                        sends[rank].append(self._part(p, self.seat(unit, position), rank))

    def _take(self, p: Tensor, weight: Tensor) -> None:
        """Keeps this process's part of a whole new weight."""
        local(p.detach()).copy_(self._part(p, weight, self.grid.rank))

    def _part(self, p: Tensor, weight: Tensor, rank: int) -> Tensor:
        """What a process holds of a whole weight of the member."""
        along = cut_along(p)
        if along is None:
            return weight
        return weight.narrow(along, *bounds(p.shape[along], self.grid.shards, rank % self.grid.shards))

    def _shape(self, p: Tensor, rank: int) -> tuple[int, ...]:
        """The shape of `_part`."""
        along, shape = cut_along(p), list(p.shape)
        if along is not None:
            shape[along] = bounds(shape[along], self.grid.shards, rank % self.grid.shards)[1]
        return tuple(shape)

    def _row(self, rank: int) -> range:
        """The processes of a process's replica."""
        first = rank - rank % self.grid.shards
        return range(first, first + self.grid.shards)

    def _nothing(self) -> list[list[Any]]:
        return [[] for _ in range(self.grid.world)]


def is_cut(p: Tensor) -> bool:
    """Whether processes hold different parts of a parameter."""
    return cut_along(p) is not None
