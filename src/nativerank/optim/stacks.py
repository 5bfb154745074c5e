"""Matrices of equal shape side by side: one update for a stack of them.

State lies in stacks for good; gradients, and the weights where a rule needs them, are copied side by side at a step, at
most STACK_BYTES of them, beyond which stacking stops paying (on a CPU that is earlier).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nativerank.linalg.gram import full_precision
from nativerank.linalg.host import has_values
from nativerank.optim.directions import Difference, New, Options, Product, Stack, State, formed
from nativerank.optim.rules import WEIGHT_SHAPED, Rule

STACK_BYTES, STACK_BYTES_CPU = 1 << 25, 1 << 21  # of one side of a stack


@dataclass
class Bucket:
    """Equal-shaped tensors of a group (or units of them: `sides` is up, down, or up, down, s) and their stacked state.

    They are parameters, or of parameters spread over processes whole copies or row shards. `turned` says which sides
    are transposed to be tall, `shapes` what the parameters are. `record` is what the rule recorded of the last step, a
    row per member of `active`.
    """

    sides: list[list[Tensor]]
    states: list[State]
    turned: tuple[bool, ...]
    shapes: list[tuple[int, ...]]
    record: State = field(default_factory=dict)
    active: list[int] = field(default_factory=list)


@dataclass
class Begun:
    """An update on its way: the stacks of the members that have gradients, and their rows among all, if not all."""

    sides: list[list[Tensor]]
    states: list[State]
    stacks: list[Stack]
    rows: Tensor | None


def members_per_stack(unit: Sequence[Tensor]) -> int:
    """How many units (a parameter, a pair, a triple) go into one stack."""
    limit = STACK_BYTES_CPU if unit[0].device.type == "cpu" else STACK_BYTES
    return max(1, limit // max(p.numel() * p.element_size() for p in unit))


@torch.no_grad()
def step_bucket(bucket: Bucket, rule: Rule, options: Options) -> None:
    """One stacked update. Members without gradients are left out, their state untouched."""
    begun = begin(bucket, rule.width > 1)
    if begun is None:
        return
    assert rule.update is not None
    with full_precision(bucket.sides[0][0].device):
        result = rule.update(*begun.stacks, options)
    finish(bucket, begun, result, options)


def begin(bucket: Bucket, with_weight: bool) -> Begun | None:
    """The stacks that a rule works on; None where no member has its gradients."""
    active = [
        i for i, members in enumerate(zip(*bucket.sides, strict=True)) if all(p.grad is not None for p in members)
    ]
    bucket.record, bucket.active = {}, active
    if not active:
        return None
    everyone = len(active) == len(bucket.sides[0])
    sides = bucket.sides if everyone else [[side[i] for i in active] for side in bucket.sides]
    known = places if has_values(sides[0][0]) else places.__wrapped__
    rows = None if everyone else known(tuple(active), sides[0][0].device)
    states = rows_of(bucket.states, rows)
    seen = zip(sides, states, bucket.turned, bucket.shapes, strict=True)
    return Begun(sides, states, [stacked(*what, with_weight) for what in seen], rows)


def finish(bucket: Bucket, begun: Begun, result: Any, options: Options) -> None:
    """Takes over what the rule returned: one change, or one per side and a record."""
    *changes, bucket.record = result if len(bucket.sides) > 1 else (result, {})
    put_rows(bucket.states, begun.states, begun.rows)
    for side, change, turned in zip(begun.sides, changes, bucket.turned, strict=True):
        if isinstance(change, New):
            torch._foreach_copy_(side, as_stored(change.weight, turned))
            continue
        if options["weight_decay"]:
            torch._foreach_mul_(side, 1 - options["lr"] * options["weight_decay"])
        subtract(side, change, turned)


@lru_cache(maxsize=64)
def places(active: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on the device; kept, for the host waits until they have got there."""
    return torch.tensor(active, device=device)


def rows_of(states: list[State], rows: Tensor | None) -> list[State]:
    """The state of some members, a copy; of all (None) the state itself."""
    return states if rows is None else [{k: v[rows.to(v.device)] for k, v in s.items()} for s in states]


def put_rows(states: list[State], some: list[State], rows: Tensor | None) -> None:
    """Writes the state of some members back."""
    if rows is not None:
        for whole, part in zip(states, some, strict=True):
            for key in whole:
                whole[key].index_copy_(0, rows.to(whole[key].device), part[key])


def subtract(side: list[Tensor], change: Difference, turned: bool) -> None:
    """p <- p - D for every member. A product goes into a CPU's matrix in one pass over it, without a D in between."""
    p = side[0]
    if isinstance(change, Product) and p.device.type == "cpu" and p.dim() == 2 and p.dtype == change.M.dtype:
        for member, M, Q in zip(side, *change, strict=True):
            (member.mT if turned else member).addmm_(M, Q, alpha=-1)
        return
    D = formed(change)
    torch._foreach_sub_(side, as_stored(D.to(p.dtype), turned))


def as_stored(D: Tensor, turned: bool) -> list[Tensor]:
    """A stack (n, ..., d, r) as the parameters lie; on a GPU the other way round in memory, else each is a launch."""
    if turned:
        D = D.mT if D.device.type == "cpu" else D.mT.contiguous()
    return list(D)


def stacked(side: list[Tensor], state: State, turned: bool, shape: tuple[int, ...], with_weight: bool) -> Stack:
    """The parameters as a Stack; a turned one, as `down` (r, d_in), becomes the tall view, momentum included."""
    weight = side_by_side([p.detach() for p in side]) if with_weight else None
    grad = side_by_side([p.grad for p in side if p.grad is not None])
    if turned:
        weight, grad = None if weight is None else weight.mT, grad.mT
        state = {k: v.mT if k in WEIGHT_SHAPED else v for k, v in state.items()}
    return Stack(grad, state, shape, weight)


def side_by_side(tensors: list[Tensor]) -> Tensor:
    """A stack; of a single tensor a view, so that large matrices are not copied at all."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
