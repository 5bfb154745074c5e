"""Where the matrices of an optimizer and their state are, and the stacks in which they are updated.

    one process     everything is here
    owner           seats are whole copies on the owner; state is there and nowhere else
    gram            seats are row shards; state of a weight's shape is cut like the weight, what is of r x r size or
                    belongs to s is on the owner, the step count everywhere

A seat is the plain tensor that a step works on, with its gradient. State lies in stacks of equal shapes for good; the
entries of `optimizer.state` are views of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nativerank.distributed.grid import SINGLE, Grid, grid_of
from nativerank.distributed.pieces import Piece, bounds, cut_along, local
from nativerank.optim.directions import State
from nativerank.optim.precision import kept_as
from nativerank.optim.rows import Rows
from nativerank.optim.rules import RULES, SMALL, WEIGHT_SHAPED, elementwise_states, initial_state
from nativerank.optim.sharded import Sharded
from nativerank.optim.stacks import Bucket, members_per_stack, side_by_side
from nativerank.optim.traffic import choose
from nativerank.optim.units import GRAM, HERE, OWNER, Unit, assign, turned, units_of

Groups = Sequence[dict[str, Any]]


class Layout:
    """Units, owners, seats and stacks of the groups of an optimizer.

    Args:
        groups: its param_groups. state: its state, which gets what belongs here at step 0 if `begin`.
        grid: the processes that train these parameters together. algebra: "auto", "gram" or "owner".
        before: the layout so far; state stays where it belongs in both.
    """

    def __init__(
        self,
        groups: Groups,
        state: dict[Tensor, State],
        grid: Grid,
        algebra: str,
        begin: bool = False,
        before: "Layout | None" = None,
    ):
        self.groups, self.state, self.grid, self.algebra = groups, state, grid, algebra
        self.units = units_of(groups)
        self.sharded: Sharded | None = None
        if grid.world > 1:
            assign(self.units, grid, lambda unit: choose(unit, groups[unit.group], grid, algebra))
            self.sharded = Sharded(grid, self.units)
        if before is not None:
            self._drop_misplaced(before)
        self._buckets: dict[int, list[Bucket]] = {}
        self._rows: list[Rows] | None = None
        if begin:
            for index, group in enumerate(groups):
                if RULES[group["rule"]].kind == "elementwise":
                    for place, p in enumerate(group["params"]):
                        names = elementwise_states(p, group["state_dtype"])
                        self._begin(index, place, 0, local(p.detach()), names)
                else:
                    self._buckets[index] = list(self._stack_up(index, begin=True))
            self._rows = list(self._row_up(begin=True))

    def forget_stacks(self) -> None:
        """State or shapes were changed from outside: stand side by side again when needed."""
        self._buckets, self._rows = {}, None

    def buckets(self, index: int) -> list[Bucket]:
        """What of a group is updated whole on this process."""
        if index not in self._buckets:
            self._buckets[index] = list(self._stack_up(index))
        return self._buckets[index]

    def rows(self) -> list[Rows]:
        """What is updated in row shards."""
        if self._rows is None:
            self._rows = list(self._row_up())
        return self._rows

    def stepped(self) -> Iterator[tuple[Bucket, list[Unit]]]:
        """The stacks of the last step, with what stands in them."""
        for index, buckets in self._buckets.items():
            here = {id(self.seat(u, 0)): u for u in self.units if u.group == index and self._whole_here(u)}
            yield from ((bucket, [here[id(p)] for p in bucket.sides[0]]) for bucket in buckets)
        yield from ((rows.bucket, rows.units) for rows in self._rows or [])

    def seat(self, unit: Unit, position: int) -> Tensor:
        """The plain tensor that a step works on in the place of a member."""
        return unit.members[position] if self.sharded is None else self.sharded.seat(unit, position)

    def first_row(self, p: Tensor) -> int:
        """Where what this process holds of a parameter begins in the whole."""
        along = cut_along(p)
        return 0 if along is None else self._bounds(p, along)[0]

    def pieces(self, names: dict[int, str]) -> Iterator[Piece]:
        """Every state tensor that this process holds, or its part of it; names of the parameters by id."""
        unit_of = {id(p): u for u in self.units for p in u.members}
        for p, state in self.state.items():
            for key, value in state.items():
                yield self._piece(f"{names[id(p)]}/{key}", key, p, value, unit_of.get(id(p)))

    # -- inside -------------------------------------------------------------------------------------------------

    def _drop_misplaced(self, before: "Layout") -> None:
        """Drops state of units that have another owner or algebra now; row shards do not care who the owner is."""
        places = {tuple(map(id, u.members)): (u.algebra, u.owner) for u in before.units}
        for unit in self.units:
            algebra, owner = places.get(tuple(map(id, unit.members)), (HERE, 0))
            for p in unit.members if (algebra, owner) != (unit.algebra, unit.owner) else ():
                state, spread = self.state.pop(p, {}), algebra == unit.algebra == GRAM
                if kept := {k: v for k, v in state.items() if spread and not self._at_owner(unit, p, k)}:
                    self.state[p] = kept

    def _piece(self, name: str, key: str, p: Tensor, value: Tensor, unit: Unit | None) -> Piece:
        along = cut_along(p)
        if unit is not None and (unit.algebra == OWNER or (unit.algebra == GRAM and self._at_owner(unit, p, key))):
            return Piece(name, value, tuple(value.shape))
        if key == "step" or along is None:
            return Piece(name, value, tuple(value.shape), writes=self.grid.rank == 0)
        start, _ = bounds(p.shape[along], self.grid.shards, self.grid.shard)
        rows = (p.shape[along], *value.shape[1:])  # of a vector over the tall side, or of a row's scales
        shape, where = (tuple(p.shape), along) if key in WEIGHT_SHAPED else (rows, 0)
        return Piece(name, value, shape, where, start, writes=self.grid.replica == 0)

    @staticmethod
    def _at_owner(unit: Unit, p: Tensor, key: str) -> bool:
        """Whether state of a unit in row shards is its owner's alone."""
        return key in SMALL or (len(unit.members) > 2 and p is unit.members[2])

    def _begin(self, index: int, place: int, position: int, held: Tensor, names: Iterable[str]) -> None:
        """The named state of a parameter at step 0, for what is held of it, unless it has it already."""
        group = self.groups[index]
        p, along = group["params"][place], cut_along(group["params"][place])
        tall = p.shape[-1] if position == 1 or p.dim() < 2 else p.shape[-2]
        part = None if along is None or held.shape == p.shape else self._bounds(p, along)
        kept = "fp32" if position == 2 else kept_as(p, group["state_dtype"])  # s is as small as it is delicate
        seed = index * 1_000_003 + place
        state = self.state.get(p, {})
        whole = self._whole_like(p)  # a shard may have fewer rows than columns
        self.state[p] = {
            k: state[k] if k in state else initial_state(k, whole if k in SMALL else held, tall, seed, kept, part)
            for k in names
        }

    def _bounds(self, p: Tensor, along: int) -> tuple[int, int]:
        return bounds(p.shape[along], self.grid.shards, self.grid.shard)

    def _whole_here(self, unit: Unit) -> bool:
        return self.sharded is None or (unit.algebra == OWNER and self.sharded.owns(unit))

    def _stack_up(self, index: int, begin: bool = False) -> Iterator[Bucket]:
        """The stacks of what of a group is updated whole here; to begin with their state too, one after the other,
        which leaves no holes."""
        rule = RULES[self.groups[index]["rule"]]
        for units in self._alike([u for u in self.units if u.group == index and self._whole_here(u)]):
            if begin:
                for u in units:
                    for j in range(rule.width):
                        self._begin(index, u.start + j, j, self.seat(u, j), rule.state_of(j))
            # Rules of one matrix take it as it is stored.
            yield self._bucket(units, [rule.state_of(j) for j in range(rule.width)], (False, True, False))

    def _row_up(self, begin: bool = False) -> Iterator[Rows]:
        """The stacks of row shards, with the small state of what is solved here; to begin with their state too."""
        for units in self._alike(sorted((u for u in self.units if u.algebra == GRAM), key=lambda u: u.owner)):
            assert self.sharded is not None
            name = self.groups[units[0].group]["rule"]
            rule, mine = RULES[name], [i for i, u in enumerate(units) if self.sharded.owns(u)]
            small = [[k for k in rule.state_of(j) if j == 2 or k in SMALL] for j in range(rule.width)]
            spread = [[k for k in rule.state_of(j) if k not in small[j]] for j in range(rule.width)]
            if begin:
                for i, u in enumerate(units):
                    for j in range(rule.width):
                        names = spread[j] + (small[j] if i in mine else [])
                        self._begin(u.group, u.start + j, j, self.seat(u, j), names)
            flags = [j < 2 and turned(j, p, name) for j, p in enumerate(units[0].members)]
            bucket = self._bucket(units, spread, flags)
            for j, keys in enumerate(small):
                if "R" in keys:
                    R = initial_state("R", self._whole_like(units[0].members[j]), 0, 0)
                    bucket.states[j]["R_inverse"] = R.repeat(len(units), 1, 1)
            yield Rows(units, bucket, mine, [self._small(units, mine, j, keys) for j, keys in enumerate(small)])

    def _small(self, units: list[Unit], mine: list[int], position: int, names: list[str]) -> State:
        """The small state of one side, a row per unit that is solved here; there may be none."""
        if mine:
            return self._stacked([units[i] for i in mine], position, names)
        like = self._whole_like(units[0].members[position])
        return {name: initial_state(name, like, like.shape[-1], 0)[None][:0] for name in names}

    @staticmethod
    def _whole_like(p: Tensor) -> Tensor:
        """A tensor of the parameter's whole shape that takes no memory."""
        return torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)

    def _alike(self, units: list[Unit]) -> Iterator[list[Unit]]:
        """Units of one group and equal shapes, as many as fit a stack."""
        found: dict[Any, list[Unit]] = {}
        for unit in units:
            seats = [self.seat(unit, j) for j in range(len(unit.members))]
            shapes = tuple((p.shape, s.shape, p.dtype, p.device) for p, s in zip(unit.members, seats, strict=True))
            found.setdefault((unit.group, shapes), []).append(unit)
        for members in found.values():
            size = members_per_stack([self.seat(members[0], j) for j in range(len(members[0].members))])
            yield from (members[i : i + size] for i in range(0, len(members), size))

    def _bucket(self, units: list[Unit], names: Sequence[Sequence[str]], flags: Sequence[bool]) -> Bucket:
        """Seats side by side, with their state."""
        width = range(len(names))
        states = [self._stacked(units, j, names[j]) for j in width]
        sides = [[self.seat(u, j) for u in units] for j in width]
        shapes = [tuple(p.shape[-2:]) for p in units[0].members]
        return Bucket(sides, states, tuple(flags[: len(names)]), shapes)

    def _stacked(self, units: list[Unit], position: int, names: Iterable[str]) -> State:
        """The named state of one side, moved into stacks of which each parameter's is a view."""
        params = [u.members[position] for u in units]
        only = alone if len(params) == 1 else lambda x: x  # a stack of several is made of copies
        stacked = {key: side_by_side([only(self.state[p][key]) for p in params]) for key in names}
        for i, p in enumerate(params):
            self.state[p].update({key: value[i] for key, value in stacked.items()})
        return stacked


def alone(x: Tensor) -> Tensor:
    """The tensor in memory of its own: a row of an earlier stack would keep that alive, and lie otherwise than in a
    resumed run, which may change the last digit of a product."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone()


def grid_of_parameters(parameters: Iterable[Tensor]) -> Grid:
    """The grid that parameters are spread over, as their mesh says; one process where none is."""
    mesh = next((p.device_mesh for p in parameters if isinstance(p, DTensor)), None)
    return SINGLE if mesh is None else grid_of(mesh)
