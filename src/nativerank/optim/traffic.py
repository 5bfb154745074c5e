"""Bytes that the step of a unit moves between processes, and the choice of algebra by them.

Sent by all processes together, in one step, of a unit with W bytes of weights on N = R x S processes (R replicas):

    owner   (S - 1) / S W of gradients to the owner in its replica, nothing where everybody has them (ddp);
            (N - 1) / S W of new weights back, (N - 1) W in ddp
    gram    (N - 1) (P + Q) for P bytes of parts and Q of answers, and 2 (N - 1) T where T bytes are summed first

`sent_bytes` says it of every process: 1 / N of it on average, more for whoever owns more. An exchange keeps buffers of
what a process sends and gets, for its moment. P, Q and T are read off the rule itself, asked about no matrices at all,
so they are what travels.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nativerank.distributed.collectives import padded_bytes
from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import bounds, cut_along
from nativerank.optim.ask import Ask, Part, packed_shape
from nativerank.optim.directions import Stack
from nativerank.optim.gram_rules import GRAM_RULES, refusal
from nativerank.optim.rules import RULES, WEIGHT_SHAPED, initial_state
from nativerank.optim.units import ALGEBRAS, GRAM, OWNER, Unit, in_rows


class GramBytes(NamedTuple):
    """Per unit: parts to the owner, answers to everybody, and what is summed before."""

    parts: int
    answers: int
    sums: int


def sent_bytes(unit: Unit, options: Mapping[str, Any], grid: Grid, algebra: str) -> Tensor:
    """What every process sends for a unit in a step, (3, replicas, shards): summed first, to the owner, and back."""
    found = torch.zeros(3, grid.replicas, grid.shards, dtype=torch.float64)
    before, there, back = found
    others, owner = grid.world - 1, divmod(unit.owner, grid.shards)
    if algebra == GRAM:
        parts, answers, sums = gram_parts(unit, options)
        before += 2 * sums * others / grid.world
        there += parts
        there[owner] -= parts
        back[owner] += others * answers
    for p in unit.members if algebra == OWNER else ():
        if cut_along(p) is None:
            back[owner] += others * p.numel() * p.element_size()
            continue
        sizes = shard_bytes(p, grid.shards)
        there[owner[0]] += sizes
        there[owner] -= sizes[owner[1]]
        back[owner] += grid.replicas * sizes.sum() - sizes[owner[1]]
    return found


def shard_bytes(p: Tensor, shards: int) -> Tensor:
    """Bytes of every shard of a parameter that is cut (shards,)."""
    along = cut_along(p)
    assert along is not None
    return row_counts(p.shape[along], shards) * (p.numel() // p.shape[along] * p.element_size())


@lru_cache
def row_counts(rows: int, shards: int) -> Tensor:
    """Rows in each shard (shards,)."""
    return torch.tensor([bounds(rows, shards, shard)[1] for shard in range(shards)], dtype=torch.float64)


def gram_parts(unit: Unit, options: Mapping[str, Any]) -> GramBytes:
    """What the gram form of the unit's rule sends, to or from one process."""
    known = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(options.items()) if k not in APART)
    return per_unit(options["rule"], tuple(tuple(p.shape) for p in unit.members), unit.members[0].dtype, known)


APART = ("params", "param_names", "name")


@lru_cache(maxsize=256)
def per_unit(rule: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, known: Any) -> GramBytes:
    """What the gram form of a rule sends of a unit with parameters of these shapes and dtype."""
    options = dict(known)
    running = GRAM_RULES[rule](*nobody(rule, shapes, dtype, options), options, lambda X: X)
    ask: Ask = next(running)
    sums = 0
    while ask.solve is None:
        sums += sum(map(size, ask.parts.values()))
        ask = running.send({name: part.tensor for name, part in ask.parts.items()})
    small = [
        {k: v for k, v in state_of_nobody(rule, j, shape, dtype, options).items()} for j, shape in enumerate(shapes)
    ]
    answer = ask.solve({name: part.tensor for name, part in ask.parts.items()}, small, options)
    return GramBytes(sum(map(size, ask.parts.values())), sum(map(size, answer.values())), sums)


def size(part: Part) -> int:
    """Bytes per unit of a part."""
    return padded_bytes(packed_shape(part)[1:], part.tensor.dtype)


def nobody(rule: str, shapes: Any, dtype: torch.dtype, options: Mapping[str, Any]) -> list[Stack]:
    """The stacks of a rule with no units and no rows in them."""
    stacks = []
    for j, shape in enumerate(shapes):
        held = torch.empty(0, *((0, min(shape)) if j < 2 else shape), dtype=dtype)
        state = state_of_nobody(rule, j, shape, dtype, options)
        for name in WEIGHT_SHAPED & set(state):
            state[name] = state[name].new_empty(held.shape)
        if "power_vector" in state:
            state["power_vector"] = state["power_vector"].new_empty(0, 0)
        if "R" in state:
            state["R_inverse"] = state["R"]
        stacks.append(Stack(held, state, shape[-2:], held))
    return stacks


def state_of_nobody(rule: str, position: int, shape: Any, dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    """The state of a side, with no units in it."""
    like = torch.zeros((), dtype=dtype).expand(1, min(shape)) if position < 2 else torch.zeros(shape, dtype=dtype)
    names = RULES[rule].state_of(position)
    kept = "fp32" if position == 2 else options["state_dtype"]
    square = like.expand(min(shape), min(shape)) if position < 2 else like
    return {name: initial_state(name, square if name == "R" else like, 1, 0, kept)[None][:0] for name in names}


def choose(unit: Unit, options: Mapping[str, Any], grid: Grid, algebra: str) -> str:
    """The algebra of a unit: as wished, or what moves fewer bytes; where rows are not to be had, its owner.

    Raises:
        ValueError: an unknown algebra, or "gram" for a rule or option that has no such form.
    """
    if algebra not in ALGEBRAS:
        raise ValueError(f"parallel.algebra must be one of {', '.join(ALGEBRAS)}, got {algebra!r}")
    refused = refusal(options["rule"], options)
    if algebra == GRAM and refused:
        raise ValueError(f"parallel.algebra gram: {refused}; take owner or auto")
    if algebra == OWNER or refused or not in_rows(unit, options["rule"]):
        return OWNER
    if algebra == GRAM:
        return GRAM
    gram, owner = (sent_bytes(replace(unit, owner=0), options, grid, way).sum() for way in (GRAM, OWNER))
    return GRAM if gram < owner else OWNER
