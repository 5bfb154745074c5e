"""Everything that a plan counts, from models of few blocks.

Equal blocks cost the same, so a model of L of them costs what few say and one more adds:

    f(L) = f(FEW) + (L - FEW) (f(FEW + 1) - f(FEW))

which holds for what is alive after every operator of a pass, too (`carried_on`), and for passes of more sequences, at
full chunks of the loss. So a plan looks at models of FEW blocks and of one more, whatever the depth; those whose blocks
differ are looked at whole. Nothing in it is fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from nativerank.accounting.rule_flops import optimizer_ops
from nativerank.accounting.trace import Op, Trace
from nativerank.accounting.traffic import exchanged_bytes, optimizer_scale, padded_shard
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.pretend import pretended
from nativerank.distributed.wrap import DTYPES, blocks
from nativerank.models import count_parameters
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.plan.counts import count_flops, with_guides
from nativerank.plan.passes import Stage, resident
from nativerank.plan.subject import Subject
from nativerank.train.setup import gradient_grid, optimizer_for, precisions, spread

FEW = 2  # blocks
Numbers = dict[str, Any]  # nested, with numbers as leaves
Course = Sequence[tuple[str, float]]  # (operator, bytes alive after it)


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of one process.

    Attributes:
        activations: bytes that wait for the backward pass.
        course: by phase bytes beyond what is held, as far as they matter for the most.
        calls: of its operators.
    """

    activations: float
    course: dict[str, Course]
    calls: dict[Op, float]

    @property
    def peak(self) -> float:
        """The most bytes beyond what is held."""
        return max(alive for course in self.course.values() for _, alive in course)

    def carried_on(self, more: "Pass", way: float) -> "Pass":
        """What lies `way` times as far from this one as `more` does, in blocks or in sequences."""
        course = {phase: carried_on(steps, more.course[phase], way) for phase, steps in self.course.items()}
        return Pass(between(self.activations, more.activations, way), course, between(self.calls, more.calls, way))


@dataclass(frozen=True)
class Figures:
    """What one process holds and does.

    Attributes:
        params, flops: of the whole model, see `plan.counts`.
        held: bytes that are there throughout, by component.
        sent: bytes that one process sends in a step.
        update: bytes that the optimizer has beyond `held` at its worst moment, new gradients included.
        update_ops: calls of its operators in a step.
        traced: passes by their sequences.
    """

    params: Numbers
    flops: Numbers
    held: Numbers
    sent: Numbers
    update: float
    update_ops: dict[Op, float]
    traced: dict[int, Pass]

    def ops(self, sequences: int) -> list[Op]:
        """The operators of one pass that was traced, and of one step of the optimizer."""
        found = {**self.traced[sequences].calls, **self.update_ops}
        return [replace(op, calls=calls) for op, calls in found.items()]

    def at(self, sequences: int, known: tuple[int, int]) -> Pass:
        """A pass; if it was not traced, one whose memory alone is right, carried on from two `known` ones that were."""
        if sequences in self.traced:
            return self.traced[sequences]
        few, more = known
        return self.traced[few].carried_on(self.traced[more], (sequences - few) / (more - few))


def carried_on(few: Course, more: Course, way: float) -> Course:
    """What is alive in a phase that has `way` times as many parts more than `few` as `more` has, which is one.

    The parts are blocks, or chunks of the loss. What is alive at an operator of part j of k changes evenly with both,
    so it is most in the first part or in the last. The first ones are found at the same place from the beginning of
    both courses, the last ones from the end, as far as the operators are the same; together that is all of `few`.
    """

    part = len(more) - len(few)

    def common(a: Course, b: Course) -> list[tuple[str, float]]:
        """But for one part, in which the operators may be the same though their places are not."""
        pairs = list(takewhile(lambda pair: pair[0][0] == pair[1][0], zip(a, b, strict=False)))
        return [(name, x + way * (y - x)) for (name, x), (_, y) in pairs[: max(0, len(pairs) - part)]]

    first, last = common(few, more), common(few[::-1], more[::-1])
    if len(first) + len(last) < len(few):  # other operators for other sizes, as some kernels are chosen
        a, b = (max(alive for _, alive in course) for course in (few, more))
        return [("", a + way * (b - a))]
    return first + last[::-1]


def between(first: Any, second: Any, way: float) -> Any:
    """first + way (second - first), for every number of two nested records; what only one has is 0 in the other."""
    if isinstance(first, dict) or isinstance(second, dict):
        first, second = first or {}, second or {}
        return {key: between(first.get(key, 0), second.get(key, 0), way) for key in {**first, **second}}
    return first + way * (second - first)


def depths(planned: Subject) -> tuple[int | None, ...]:
    """Numbers of blocks of the models that are looked at; None is all of them."""
    depth = planned.equal_blocks()
    return (None,) if depth is None or depth <= FEW + 1 else (FEW, FEW + 1)


def figures(planned: Subject, sequences: Sequence[int] | None = None) -> Figures:
    """All of them.

    Args:
        planned: see `plan.subject`.
        sequences: of a pass, to be traced; None takes those of the plan alone.
    """
    counts = sequences or [planned.sequences]
    looks = [look(planned, depth, counts) for depth in depths(planned)]
    if len(looks) == 1:
        return Figures(*looks[0])
    ((*few, few_traced), (*more, more_traced)), depth = looks, planned.equal_blocks()
    assert depth is not None
    way = depth - FEW
    numbers: list[Any] = [between(a, b, way) for a, b in zip(few, more, strict=True)]
    numbers.append({n: few_traced[n].carried_on(more_traced[n], way) for n in counts})
    return Figures(*numbers)


def look(planned: Subject, depth: int | None, counts: Sequence[int]) -> tuple[Any, ...]:
    """The `Figures` of a model of so many blocks; None is all of them."""
    stage = Stage(planned, depth)
    traced = {n: as_pass(stage.run(n)) for n in counts}
    if (share := with_guides(planned)) < 1 and planned.sequences in traced:  # bytes with guides, time as in the run
        n = planned.sequences
        without = as_pass(stage.run(n, guided=False))
        traced[n] = replace(traced[n], calls=between(without.calls, traced[n].calls, share))
    model, _ = planned.build(depth)
    params: Numbers = {**count_parameters(model)}
    optimizer = optimizer_for(planned.config, model)
    flops = count_flops(planned, model, optimizer.param_groups)
    new = 0 if resident(planned) else sum(p.nbytes for p in model.parameters() if p.requires_grad)
    update = new + stage.update_bytes()
    shape = planned.processes
    ops = {replace(op, calls=1): op.calls for op in optimizer_ops(optimizer.param_groups, shape.world, shape.shards)}
    if shape.world == 1:
        return params, flops, held_bytes(planned, model, optimizer, SINGLE), {}, update, ops, traced
    with pretended(shape.replicas, shape.shards) as grid:
        own = gradient_grid(planned.config, grid)
        if own.shards > 1:
            spread(planned.config, model, own)
        if own.world > 1:
            optimizer = optimizer_for(planned.config, model, own)
        held = held_bytes(planned, model, optimizer, own)
        return params, flops, held, sent_bytes(planned, model, optimizer, own), update, ops, traced


def as_pass(found: Trace) -> Pass:
    """What a plan needs of a trace."""
    return Pass(found.held, {**found.course}, {replace(op, calls=1): op.calls for op in found.ops})


def held_bytes(planned: Subject, model: nn.Module, optimizer: LowRankOptimizer, grid: Grid) -> Numbers:
    """Bytes of one process that are there in every phase, or whenever a model computes."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    config = planned.config
    scale = optimizer_scale(optimizer.param_groups, grid, config.parallel.algebra)
    found: Numbers = {
        "weights": sum(padded_shard(p, grid.shards) * p.element_size() for p in parameters),
        "gradients": sum(padded_shard(p, grid.shards) * p.element_size() for p in trained),
        "optimizer": scale["state_bytes"],
        "owned_copies": scale["owned_copies_bytes"],
        "buffers": sum(b.nbytes for b in model.buffers()),
        "gathered": gathered_bytes(planned, model, grid) if grid.shards > 1 else 0,
        "buckets": 0,
        "diloco": 0,
    }
    if config.optim.layerwise:
        sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks(model)]
        inside = {id(p) for block in blocks(model) for p in block.parameters()}
        found["gradients"] = max([*sizes, *(p.nbytes for p in trained if id(p) not in inside)])
    if grid.shards == 1 and grid.world > 1 and config.device == "cpu":
        found["buckets"] = found["gradients"]  # on CUDA gradients are views of them
    if config.parallel.diloco.every:
        whole = sum(p.numel() * p.element_size() for p in trained)
        found["diloco"] = 2 * whole / planned.processes.world
    return found


def gathered_bytes(planned: Subject, model: nn.Module, grid: Grid) -> int:
    """Whole weights and gradients that FSDP2 has at once in the backward pass.

    Weights of a block at work and of the one that is gathered meanwhile, of the rest of the model all along; gradients
    of a block, and a copy of them that is added up.
    """
    choice = precisions(planned.config, grid)
    inside = {id(p) for block in blocks(model) for p in block.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    wide = (DTYPES[choice["precision"]] or torch.float32).itemsize
    added = (DTYPES[choice["reduce"]] or torch.float32).itemsize
    at_once = 2 * max(sizes) if planned.config.parallel.reshard_after_forward else sum(sizes)
    return wide * (at_once + rest) + (wide + added) * max(max(sizes), rest)


def sent_bytes(planned: Subject, model: nn.Module, optimizer: LowRankOptimizer, grid: Grid) -> Numbers:
    """What one process sends: gathering and gradients per pass or step, and the optimizer's exchange."""
    choice, p = precisions(planned.config, grid), planned.config.parallel
    precision, reduce = DTYPES[choice["precision"]], DTYPES[choice["reduce"]]
    gradients = exchanged_bytes(model, grid, p.reshard_after_forward, precision, reduce)
    moved = optimizer_scale(optimizer.param_groups, grid, p.algebra)["bytes"]["total"]
    once = gradients["replica_all_reduce"]
    return {"gradient_exchange": (gradients["total"] - once) * planned.passes + once, "optimizer": moved}
