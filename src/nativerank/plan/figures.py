"""Everything that a plan counts, from models of few blocks.

Equal blocks cost the same, so a model of L of them costs what two say and a third adds:

    f(L) = f(2) + (L - 2) (f(3) - f(2))

and of the sequences of a pass, activations and traffic alike, at full chunks of the loss. So a plan looks at two blocks
and at three, whatever the depth; models whose blocks differ are looked at whole. Nothing in it is fitted.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nativerank.accounting.rule_flops import optimizer_ops
from nativerank.accounting.trace import OPTIMIZER, Op
from nativerank.accounting.traffic import exchanged_bytes, optimizer_scale, padded_shard
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.pretend import pretended
from nativerank.distributed.wrap import DTYPES, blocks
from nativerank.models import count_parameters
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.plan.counts import count_flops
from nativerank.plan.passes import chunk, resident, trace, update_bytes
from nativerank.plan.subject import Subject
from nativerank.train.setup import gradient_grid, optimizer_for, precisions, spread

FEW, MORE = 2, 3  # blocks
Numbers = dict[str, Any]  # nested, with numbers as leaves


@dataclass(frozen=True)
class Figures:
    """What one process holds and does.

    Attributes:
        params, flops: of the whole model, see `plan.counts`.
        held: bytes that are there throughout, by component.
        sent: bytes that one process sends in a step.
        traced: by sequences of a pass: bytes beyond `held` and traffic of the operators.
        update: operators of one step of the optimizer.
    """

    params: Numbers
    flops: Numbers
    held: Numbers
    sent: Numbers
    traced: dict[int, Numbers]
    update: Numbers

    def at(self, sequences: int) -> Numbers:
        """What was traced, at another number of sequences."""
        if sequences in self.traced:
            return self.traced[sequences]
        *_, few, many = sorted(self.traced)
        return between(self.traced[few], self.traced[many], (sequences - few) / (many - few))

    def ops(self, sequences: int) -> list[Op]:
        """The operators of one pass, and of one step of the optimizer."""
        found = {**self.at(sequences)["ops"], OPTIMIZER: self.update}
        return [Op(phase, name, **cost) for phase, rows in found.items() for name, cost in rows.items()]


def between(first: Any, second: Any, way: float) -> Any:
    """first + way (second - first), for every number of two nested records; what only one has is 0 in the other."""
    if isinstance(first, dict) or isinstance(second, dict):
        first, second = first or {}, second or {}
        return {key: between(first.get(key, 0), second.get(key, 0), way) for key in {**first, **second}}
    return first + way * (second - first)


def figures(planned: Subject, sequences: tuple[int, ...] | None = None) -> Figures:
    """All of them.

    Args:
        planned: see `plan.subject`.
        sequences: of a pass, to be traced; None takes what the plan has, and twice the fewest of full chunks.
    """
    counts = traced_sequences(planned) if sequences is None else sequences
    depth = planned.equal_blocks()
    if depth is None or depth <= MORE:
        return Figures(*look(planned, None, counts))
    few, more = (look(planned, n, counts) for n in (FEW, MORE))
    return Figures(*(between(few[i], more[i], depth - FEW) for i in range(len(few))))


def traced_sequences(planned: Subject) -> tuple[int, ...]:
    """Two numbers of sequences whose tokens fill chunks of the loss; and that of a pass, if it has fewer."""
    fewest = max(1, chunk(planned) // planned.context)
    return tuple(sorted({min(planned.sequences, fewest), fewest, 2 * fewest}))


def look(planned: Subject, depth: int | None, counts: tuple[int, ...]) -> tuple[Any, ...]:
    """(params, flops, held, sent, traced, update) of a model of so many blocks; None is all of them."""
    model, _ = planned.build(depth)
    params: Numbers = {**count_parameters(model)}
    optimizer = optimizer_for(planned.config, model)
    flops = count_flops(planned, model, optimizer.param_groups)
    traced = {n: trace(planned, depth, n) for n in counts}
    new = 0 if resident(planned) else sum(p.nbytes for p in model.parameters() if p.requires_grad)
    working = update_bytes(planned, depth)
    for found in traced.values():
        found["peak"][OPTIMIZER] = new + working
    shape = planned.processes
    update = {
        op.name: {"calls": op.calls, "flops": op.flops, "bytes": op.bytes}
        for op in optimizer_ops(optimizer.param_groups, shape.world, shape.shards)
    }
    if shape.world == 1:
        return params, flops, held_bytes(planned, model, optimizer, SINGLE), {}, traced, update
    with pretended(shape.replicas, shape.shards) as grid:
        own = gradient_grid(planned.config, grid)
        if own.shards > 1:
            spread(planned.config, model, own)
        if own.world > 1:
            optimizer = optimizer_for(planned.config, model, own)
        held = held_bytes(planned, model, optimizer, own)
        return params, flops, held, sent_bytes(planned, model, optimizer, own), traced, update


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
