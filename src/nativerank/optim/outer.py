"""DiLoCo: replicas train on their own for a round of inner steps, then agree on weights by one outer step.

Every parameter's weights come to an owner, which does the arithmetic of `optim.outer_rules` and sends the new ones
back: an all-to-all there and one back, however many parameters there are. A process sends its local shards twice, as in
one all-reduce of them, and once per round where synchronous training does so per step. A factor pair has one owner,
which holds it whole; a large tensor that is not factorized is dealt out in rows. theta_0 and the outer momentum exist
on owners only: two copies of the weights over all processes together. An exchange takes two buffers more of what a
process holds, for its moment.

The inner optimizers' states stay where they are and differ between replicas, as in DiLoCo. Where an outer step turns
the basis of a frame, moments go along (`frames.in_new_basis`). tsvd holds raw factors A = Q R, of which W depends on Q
alone and R says in which coordinates AdamW moves it: Q is averaged as every frame is; R, triangular with a positive
diagonal, which means keep, becomes the replicas' mean (one all-reduce of r x r) and U' R' is the raw factor again. Raw
moments follow by way of those of Q: M -> M R_i^T T R'^-T, as where ranks change.

The bound of certified inner steps adds up over a round to H eta for each replica and for their mean, but the outer step
goes further than the mean; what it does to each W is measured, and with `cap` kept within cap * H eta.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.distributed.collectives import Kind, exchange, summed
from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import Piece
from nativerank.optim.frames import in_new_basis
from nativerank.optim.outer_rules import PLAIN, OuterStep, Sgd, agree, at_other_ranks, changed
from nativerank.optim.outer_units import OuterLayout, OuterUnit, assigned, dealt_along, seen, wide
from nativerank.optim.rules import RULES, WEIGHT_SHAPED

STATE = "outer_momentum"
Norms = tuple[float, float, float]


@dataclass
class Held:
    """What an owner keeps of a unit, as the parameters are stored: theta_0, and v."""

    start: list[Tensor]
    velocity: list[Tensor]


@dataclass(frozen=True)
class Report:
    """One outer step.

    pairs: factorized module -> (||mean W - W of the mean factors||, ||dW||, share of the step that was kept), spectral
    norms, the largest of stacked experts. budget: the sum of the inner rates, H eta.
    """

    pairs: dict[str, Norms]
    budget: float

    def row(self, names: Iterable[str] = ()) -> dict[str, Any]:
        """Plain numbers: extremes over all pairs, and what the named ones have."""
        found: dict[str, Any] = {"budget": self.budget}
        if self.pairs:
            gaps, changes, kept = zip(*self.pairs.values(), strict=True)
            found |= {"factor_gap": max(gaps), "update_norm": max(changes), "shortened": sum(k < 1 for k in kept)}
            keys = "factor_gap", "update_norm", "kept"
            found["pairs"] = {n: dict(zip(keys, self.pairs[n], strict=True)) for n in names if n in self.pairs}
        return found


class Outer:
    """The outer optimizer over the replicas of a grid. Collective, but for `due` and `pieces`.

    Args:
        model: its trainable parameters are agreed on; shards of the grid hold them as DTensors, replicas alike.
        optimizer: the inner one, of this replica.
        grid: of all processes.
        every: inner steps of a round.
        lr, momentum, nesterov: of the outer SGD.
        cap: largest ||dW||_2 of an outer step, in units of the sum of the round's inner rates; None for any.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        grid: Grid,
        every: int,
        lr: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        cap: float | None = None,
    ):
        if every < 1 or lr <= 0 or not 0 <= momentum < 1 or (cap is not None and cap <= 0):
            raise ValueError(f"invalid hyperparameters of the outer step: {every=}, {lr=}, {momentum=}, {cap=}")
        self.model, self.optimizer, self.grid = model, optimizer, grid
        self.every, self.sgd, self.cap = every, Sgd(lr, momentum, nesterov), cap
        self.budget = 0.0  # sum of the rates of the round so far
        self.units = list(assigned(model, optimizer, grid))
        self.held: dict[OuterUnit, Held] = {}
        self.begin()

    def due(self, step: int, last: int) -> bool:
        """Whether an outer step comes after this many inner ones; the last is always followed by one."""
        return step % self.every == 0 or step == last

    @torch.no_grad()
    def begin(self, forget: bool = False) -> None:
        """Starts a round from the weights as they are, which all replicas share: at the start and where ranks change.

        Args:
            forget: start without momentum, for one that is loaded next.
        """
        self.budget = 0.0
        for unit, (whole,) in self._gathered(self.layout(), replicas=1):
            kept = None if forget else self.held.get(unit)
            velocity = [torch.zeros_like(x, dtype=wide(x)) for x in whole] if kept is None else kept.velocity
            if kept is not None and unit.form != PLAIN and velocity[0].shape != whole[0].shape:
                velocity = list(seen(at_other_ranks(seen(kept.start), seen(whole), seen(velocity))))
            self.held[unit] = Held(whole, [v.contiguous() for v in velocity])

    @torch.no_grad()
    def step(self) -> Report:
        """Ends a round: new weights in every replica, moments in their bases."""
        limit = None if self.cap is None else self.cap * self.budget
        layout = self.layout()
        found = {unit: self._agree(unit, ends, limit) for unit, ends in self._gathered(layout, self.grid.replicas)}
        report = Report(self._spread(layout, found), self.budget)
        self.budget = 0.0
        return report

    def layout(self) -> OuterLayout:
        """Units and parameters that are there now."""
        layout = OuterLayout(self.grid, dict(self.model.named_parameters()), [[] for _ in range(self.grid.world)])
        for unit in self.units:
            if all(name in layout.parameters for name in unit.members):
                layout.units[unit.owner].append(unit)
            else:
                self.held.pop(unit, None)
        return layout

    def pieces(self, names: dict[int, str]) -> list[Piece]:
        """What a checkpoint keeps: the inner state as PARAMETER/STATE@REPLICA, and the outer momentum held here.

        Args:
            names: of the parameters, by id.
        """
        inner = self.optimizer.pieces(names)
        found = [replace(piece, name=f"{piece.name}@{self.grid.replica}") for piece in inner]
        parameters = dict(self.model.named_parameters())
        for unit, held in self.held.items():
            for name, v in zip(unit.members, held.velocity, strict=True):
                along = None if unit.length is None else dealt_along(parameters[name])
                found.append(Piece(f"{name}/{STATE}", v, tuple(parameters[name].shape), along, unit.start))
        return found

    # -- there and back -------------------------------------------------------------------------------------------

    def _gathered(self, layout: OuterLayout, replicas: int) -> Iterator[tuple[OuterUnit, list[list[Tensor]]]]:
        """The units owned here, with what each of the first so many replicas has of every member."""
        grid, mine = self.grid, layout.units[self.grid.rank]
        sends: list[list[Tensor]] = [[] for _ in range(grid.world)]
        if grid.replica < replicas:
            sends = [[layout.part(unit, name) for unit in units for name in unit.members] for units in layout.units]
        kinds = [[layout.kind(u, name, shard) for u in mine for name in u.members] for shard in range(grid.shards)]
        arrived = self._swap(sends, kinds * replicas + [[]] * (grid.world - replicas * grid.shards))
        queues = [iter(tensors) for tensors in arrived[: replicas * grid.shards]]
        for unit in mine:
            parts = [[next(queue) for _ in unit.members] for queue in queues]
            by_replica = [parts[i : i + grid.shards] for i in range(0, len(parts), grid.shards)]
            yield unit, [[layout.joined(unit, j, shards) for j in range(len(unit.members))] for shards in by_replica]

    def _agree(self, unit: OuterUnit, ends: Sequence[list[Tensor]], limit: float | None) -> OuterStep:
        """The outer step of a unit that is owned here."""
        held, tall = self.held[unit], tuple if unit.form == PLAIN else seen
        start, velocity, *at_end = (tall(tensors) for tensors in (held.start, held.velocity, *ends))
        found = agree(unit.form, start, at_end, velocity, self.sgd._replace(limit=limit))
        held.start, held.velocity = ([x.contiguous() for x in tall(xs)] for xs in found[:2])
        return found

    def _spread(self, layout: OuterLayout, found: dict[OuterUnit, OuterStep]) -> dict[str, Norms]:
        """New weights and moments everywhere; the norms of every pair."""
        sends = [
            [t for unit, agreed in found.items() for t in self._outgoing(layout, unit, agreed, shard)]
            for shard in range(self.grid.shards)
        ]
        expected = [[kind for unit in units for kind in self._returned(layout, unit)] for units in layout.units]
        arrived = self._swap(sends * self.grid.replicas, expected)
        turns, norms = dict[str, Tensor](), dict[str, Norms]()
        for units, tensors in zip(layout.units, arrived, strict=True):
            queue = iter(tensors)
            for unit in units:
                for name in unit.members:
                    layout.part(unit, name).copy_(next(queue))
                turns |= {unit.members[i]: next(queue) for i in changed(unit.form)}
                if unit.form != PLAIN:
                    gap, change, kept = next(queue).tolist()
                    norms[unit.name] = gap, change, kept
        self._turn(layout, turns)
        self.optimizer.loaded()
        return norms

    def _outgoing(self, layout: OuterLayout, unit: OuterUnit, agreed: OuterStep, shard: int) -> Iterator[Tensor]:
        """What processes with this shard get of a unit that is owned here."""
        for name, whole in zip(unit.members, self.held[unit].start, strict=True):
            yield layout.part_of(unit, name, whole, shard)
        yield from (T.to(wide(agreed.weights[0])) for T in agreed.bases)
        if agreed.gap is not None and agreed.change is not None and agreed.kept is not None:
            yield torch.stack([agreed.gap.max(), agreed.change.max(), agreed.kept.min()])

    def _returned(self, layout: OuterLayout, unit: OuterUnit) -> Iterator[Kind]:
        """What this process gets of a unit."""
        yield from (layout.kind(unit, name, self.grid.shard) for name in unit.members)
        p = layout.parameters[unit.members[0]]
        yield from (((*p.shape[:-2], p.shape[-1], p.shape[-1]), wide(p)) for _ in changed(unit.form))
        if unit.form != PLAIN:
            yield (3,), torch.float64

    def _swap(self, sends: Sequence[list[Tensor]], expected: Sequence[list[Kind]]) -> list[list[Tensor]]:
        if self.grid.world == 1:
            return [list(sends[0])]
        device = next(self.model.parameters()).device  # also of a process that sends nothing
        return exchange(sends, expected, self.grid.everyone, device)

    # -- the inner optimizer's state ------------------------------------------------------------------------------

    def _turn(self, layout: OuterLayout, turns: dict[str, Tensor]) -> None:
        """Moments that are held here, in the new bases."""
        turns = turns | self._raw_turns(layout, turns)
        for unit in (unit for units in layout.units for unit in units):
            for i in changed(unit.form):
                state = self.optimizer.state.get(layout.parameters[unit.members[i]], {})
                tall = {k: v.mT if i == 1 and k in WEIGHT_SHAPED else v for k, v in state.items()}
                in_new_basis(tall, turns[unit.members[i]])

    def _raw_turns(self, layout: OuterLayout, turns: dict[str, Tensor]) -> dict[str, Tensor]:
        """R_i^T T R'^-T of every factor of tsvd, whose R becomes the mean of the replicas'."""
        rules = {id(p): group["rule"] for group in self.optimizer.param_groups for p in group["params"]}
        raw = {n: T for n, T in turns.items() if "R" in RULES[rules[id(layout.parameters[n])]].state}
        held = {n: R for n in raw if (R := self.optimizer.state.get(layout.parameters[n], {}).get("R")) is not None}
        before = [R.clone() for R in held.values()]
        if held and self.grid.replicas > 1:
            for R, total in zip(held.values(), summed(before, self.grid.along_replicas), strict=True):
                R.copy_(total / self.grid.replicas)
        found = {name: torch.zeros_like(T) for name, T in raw.items()}  # of one process among the shards it is not
        for (name, new), old in zip(held.items(), before, strict=True):
            T = raw[name]
            found[name] = torch.linalg.solve_triangular(new.to(T).mT, old.to(T).mT @ T, upper=False, left=False)
        if found and self.grid.shards > 1:
            return dict(zip(found, summed(list(found.values()), self.grid.along_shards), strict=True))
        return found
