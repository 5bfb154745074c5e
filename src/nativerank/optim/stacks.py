"""Matrices of equal shape side by side: one update for a stack of them.

State lies in stacks for good; gradients, and the weights where a rule needs them, are copied side by side at a step, at
most STACK_BYTES of them, beyond which stacking stops paying (on a CPU that is earlier).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nativerank.linalg.gram import full_precision
from nativerank.optim.directions import Difference, New, Options, Product, Stack, State, formed
from nativerank.optim.rules import WEIGHT_SHAPED, Rule

STACK_BYTES, STACK_BYTES_CPU = 1 << 25, 1 << 21  # of one side of a stack


@dataclass
class Bucket:
    """Equal-shaped parameters of a group (or units: `sides` is up, down, or up, down, s) and their stacked state.

    `record` is what the rule recorded of the last step, a row per member of `active`.
    """

    sides: list[list[Tensor]]
    states: list[State]
    record: State = field(default_factory=dict)
    active: list[int] = field(default_factory=list)


def members_per_stack(unit: Sequence[Tensor]) -> int:
    """How many units (a parameter, a pair, a triple) go into one stack."""
    limit = STACK_BYTES_CPU if unit[0].device.type == "cpu" else STACK_BYTES
    return max(1, limit // max(p.numel() * p.element_size() for p in unit))


@torch.no_grad()
def step_bucket(bucket: Bucket, rule: Rule, options: Options) -> None:
    """One stacked update. Members without gradients are left out, their state untouched."""
    active = [
        i for i, members in enumerate(zip(*bucket.sides, strict=True)) if all(p.grad is not None for p in members)
    ]
    bucket.record, bucket.active = {}, active
    if not active:
        return
    everyone = len(active) == len(bucket.sides[0])
    sides = bucket.sides if everyone else [[side[i] for i in active] for side in bucket.sides]
    rows = None if everyone else torch.tensor(active, device=sides[0][0].device)
    states = bucket.states if rows is None else [{k: v[rows.to(v.device)] for k, v in s.items()} for s in bucket.states]
    several = rule.width > 1
    stacks = [stacked(side, state, i, several) for i, (side, state) in enumerate(zip(sides, states, strict=True))]
    assert rule.update is not None
    with full_precision(sides[0][0].device):
        result = rule.update(*stacks, options)
    *changes, bucket.record = result if several else (result, {})
    if rows is not None:
        for whole, part in zip(bucket.states, states, strict=True):
            for key in whole:
                whole[key].index_copy_(0, rows.to(whole[key].device), part[key])
    for i, (side, change) in enumerate(zip(sides, changes, strict=True)):
        if isinstance(change, New):
            torch._foreach_copy_(side, list(change.weight.mT if i == 1 else change.weight))
            continue
        if options["weight_decay"]:
            torch._foreach_mul_(side, 1 - options["lr"] * options["weight_decay"])
        subtract(side, change, i == 1)


def subtract(side: list[Tensor], change: Difference, down: bool) -> None:
    """p <- p - D for every member. A product goes into a CPU's matrix in one pass over it, without a D in between."""
    p = side[0]
    if isinstance(change, Product) and p.device.type == "cpu" and p.dim() == 2 and p.dtype == change.M.dtype:
        for member, M, Q in zip(side, *change, strict=True):
            (member.mT if down else member).addmm_(M, Q, alpha=-1)
        return
    D = formed(change)
    torch._foreach_sub_(side, list((D.mT if down else D).to(p.dtype)))


def stacked(side: list[Tensor], state: State, position: int, with_weight: bool) -> Stack:
    """The parameters as a Stack; a `down` (r, d_in) becomes the tall view B (d_in, r), momentum included."""
    weight = side_by_side([p.detach() for p in side]) if with_weight else None
    grad = side_by_side([p.grad for p in side if p.grad is not None])
    if position == 1:
        weight, grad = None if weight is None else weight.mT, grad.mT
        state = {k: v.mT if k in WEIGHT_SHAPED else v for k, v in state.items()}
    return Stack(grad, state, tuple(side[0].shape[-2:]), weight)


def side_by_side(tensors: list[Tensor]) -> Tensor:
    """A stack; of a single tensor a view, so that large matrices are not copied at all."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
