"""Memory and traffic of a training step on a grid of processes, from shapes: nothing is allocated and nothing sent.

A grid has N = R S processes, R replicas of S shards. Bytes are what one process sends in a step; a message counts once,
for its sender, and what stays in a process is free. For B bytes, all of a tensor:

| phase | bytes sent per process |
|---|---|
| FSDP all-gather, forward; again backward where blocks were let go | B (S - 1) / S |
| FSDP reduce-scatter of gradients (a ring) | B (S - 1) / S |
| all-reduce of gradients over replicas (a ring; DDP is S = 1) | 2 B / S (R - 1) / R |
| optimizer, `gram` and `owner` | 1 / N of what all send for each unit, see `optim.traffic` |
| optimizer, gathering Muon | B (S - 1) / S: whole momenta on every process, which solves every matrix |

FSDP2 pads shards to equal size, and B is counted with that padding; the optimizer's exchanges pad each tensor to 8
bytes, which is left out. Owners are spread by cost, so sums of their work are given as the largest of any process.

r x r FLOPs of a factor: (4 k - 3) 2 r^3 for k orthogonalizing steps, 2 r^3 for bringing a frame back to orthonormal
columns (Cholesky, inverse and what joins them).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import bounds, cut_along, local
from nativerank.linalg.orthogonalize import orthogonalize_flops
from nativerank.optim.directions import NONE
from nativerank.optim.gram_rules import refusal
from nativerank.optim.precision import state_dtype
from nativerank.optim.rules import RULES, SMALL, WEIGHT_SHAPED
from nativerank.optim.traffic import choose, gram_parts
from nativerank.optim.units import ALGEBRAS, GRAM, OWNER, Unit, assign, units_of

Groups = Sequence[dict[str, Any]]
GATHER = "gather"


def scale_on_paper(
    model: nn.Module,
    groups: Groups,
    grid: Grid,
    *,
    reshard_after_forward: bool = True,
    precision: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
) -> dict[str, Any]:
    """Bytes and r x r FLOPs per process of one step, in every algebra and with a gathering Muon.

    Args:
        model: wrapped for the grid; the meta device will do.
        groups: of its optimizer.
        grid: its processes.
        reshard_after_forward, precision, reduce: as in ParallelConfig.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    held = sum(local(p.detach()).nbytes for p in parameters)
    return {
        "replicas": grid.replicas,
        "shards": grid.shards,
        "bytes": {"parameters": held, "gradients": held},
        "gradient_exchange": exchanged_bytes(model, grid, reshard_after_forward, precision, reduce),
        "optimizer": {
            **{way: optimizer_scale(groups, grid, way) for way in ways_of(groups)},
            GATHER: gathering_scale(groups, grid),
        },
    }


def ways_of(groups: Groups) -> list[str]:
    """The algebras that the groups' rules have."""
    refused = any(refusal(group["rule"], group) for group in groups if RULES[group["rule"]].kind != "elementwise")
    return [way for way in ALGEBRAS if way != GRAM or not refused]


def exchanged_bytes(
    model: nn.Module, grid: Grid, reshard_after_forward: bool, precision: torch.dtype | None, reduce: torch.dtype | None
) -> dict[str, float]:
    """Bytes sent per process for gathering weights and averaging gradients, by phase."""
    inner = {id(p) for module in model.modules() if is_sharded_block(module, model) for p in module.parameters()}
    sizes: Counter[str] = Counter()
    for p in model.parameters():
        here = padded_shard(p, grid.shards)
        weight, grad = (here * (dtype or p.dtype).itemsize for dtype in (precision, reduce or precision))
        sizes["all_gather_forward"] += weight * (grid.shards - 1)
        if reshard_after_forward and id(p) in inner:
            sizes["all_gather_backward"] += weight * (grid.shards - 1)
        if p.requires_grad:
            sizes["reduce_scatter"] += grad * (grid.shards - 1)
            sizes["replica_all_reduce"] += 2 * grad * (grid.replicas - 1)
    found: dict[str, float] = {
        name: sizes[name] for name in ("all_gather_forward", "all_gather_backward", "reduce_scatter")
    }
    found["replica_all_reduce"] = sizes["replica_all_reduce"] / grid.replicas
    return found | {"total": sum(found.values())}


def is_sharded_block(module: nn.Module, model: nn.Module) -> bool:
    """Whether FSDP2 gathers a module by itself; the root's own weights stay gathered between the passes."""
    return isinstance(module, FSDPModule) and module is not model


def padded_shard(p: Tensor, shards: int) -> int:
    """Numbers in the largest shard of a parameter; all of them where it is not cut."""
    along = cut_along(p)
    return p.numel() if along is None else p.numel() // p.shape[along] * bounds(p.shape[along], shards, 0)[1]


def optimizer_scale(groups: Groups, grid: Grid, algebra: str) -> dict[str, Any]:
    """The optimizer's traffic by phase, its state and its r x r FLOPs; of what is not even, the largest process's."""
    units = units_of(groups)
    assign(units, grid, lambda unit: choose(unit, groups[unit.group], grid, algebra))
    phases: Counter[str] = Counter()
    for unit in units:
        phases.update(sent(unit, groups[unit.group], grid))
    flops = [0] * grid.world
    for unit in units:
        flops[unit.owner] += solve_flops(unit.members, groups[unit.group])
    per_process = {name: total / grid.world for name, total in phases.items()}
    return {
        "bytes": {**per_process, "total": sum(per_process.values())},
        "state_bytes": max(state_bytes(groups, units, grid)),
        "matrices": dict(Counter(unit.algebra for unit in units)),
        "r_by_r_flops": max(flops),
    }


def sent(unit: Unit, options: Mapping[str, Any], grid: Grid) -> dict[str, float]:
    """Bytes that all processes together send for a unit, by phase: asked first, to its owner, and back."""
    others, first, there, back = grid.world - 1, 0.0, 0.0, 0.0
    if unit.algebra == GRAM:
        found = gram_parts(unit, options)
        first, there, back = (float(others * size) for size in (2 * found.sums, found.parts, found.answers))
    elif unit.algebra == OWNER:
        for p in unit.members:
            along, size = cut_along(p), p.numel() * p.element_size()
            if along is None:
                back += others * size
                continue
            own = size // p.shape[along] * bounds(p.shape[along], grid.shards, unit.owner % grid.shards)[1]
            there, back = there + size - own, back + grid.replicas * size - own
    return {"before": first, "to_owners": there, "back": back}


def gathering_scale(groups: Groups, grid: Grid) -> dict[str, Any]:
    """The same for a Muon that gathers whole momenta and solves every matrix on every process."""
    units = units_of(groups)
    gathered = sum(
        padded_shard(p, grid.shards) * p.element_size() * (grid.shards - 1)
        for unit in units
        for p in unit.members
        if cut_along(p) is not None
    )
    return {
        "bytes": {"to_owners": float(gathered), "total": float(gathered)},
        "r_by_r_flops": sum(solve_flops(unit.members, groups[unit.group]) for unit in units),
    }


def solve_flops(members: Sequence[Tensor], options: Mapping[str, Any]) -> int:
    """r x r FLOPs of one unit, wherever they are done."""
    rule, total = options["rule"], 0
    for p in members[:2]:
        r, stack = min(p.shape[-2:]), prod(p.shape[:-2])
        reads = RULES[rule].options
        if "orthogonalizer" in reads and options["orthogonalizer"] != NONE:
            total += stack * orthogonalize_flops(0, r, options["orthogonalizer_steps"])
        if "retraction" in reads:
            total += stack * 2 * r**3
    return total


def state_bytes(groups: Groups, units: Iterable[Unit], grid: Grid) -> list[int]:
    """Bytes of optimizer state on every process, whole copies of owned weights included."""
    everywhere = 0  # on every process alike
    by_shard, by_rank = [0] * grid.shards, [0] * grid.world
    elementwise = [
        (p, group) for group in groups if RULES[group["rule"]].kind == "elementwise" for p in group["params"]
    ]
    cut: Counter[tuple[int, int | None, int]] = Counter()  # (size along the cut, bytes of one row of it)

    def spread(p: Tensor, bytes_of_all: int) -> None:
        along = cut_along(p)
        rows = 1 if along is None else p.shape[along]
        cut[rows, along, bytes_of_all // rows] += 1

    for p, group in elementwise:
        everywhere += kept_bytes("step", p, group)
        spread(p, 2 * kept_bytes("exp_avg", p, group))
    for unit in units:
        group = groups[unit.group]
        for position, p in enumerate(unit.members):
            for name in RULES[group["rule"]].state_of(position):
                size = kept_bytes(name, p, group if position < 2 else {**group, "state_dtype": "fp32"})
                if unit.algebra == OWNER or position == 2 or name in SMALL:
                    by_rank[unit.owner] += size
                    everywhere += size if name in SMALL and unit.algebra == GRAM else 0  # its inverse
                elif name == "step":
                    everywhere += size
                else:
                    spread(p, size)
            if unit.algebra == OWNER and cut_along(p) is not None:
                by_rank[unit.owner] += p.numel() * p.element_size()
            elif unit.algebra == GRAM and position == 2:
                everywhere += p.numel() * p.element_size()
    for (rows, along, row_bytes), count in cut.items():
        for shard in range(grid.shards):
            by_shard[shard] += count * row_bytes * (rows if along is None else bounds(rows, grid.shards, shard)[1])
    return [everywhere + by_shard[rank % grid.shards] + own for rank, own in enumerate(by_rank)]


def kept_bytes(name: str, p: Tensor, options: Mapping[str, Any]) -> int:
    """Bytes of one state tensor of a whole parameter."""
    if name == "step":
        return torch.float32.itemsize
    if name in SMALL:
        return min(p.shape[-2:]) ** 2 * torch.promote_types(p.dtype, torch.float32).itemsize
    if name in WEIGHT_SHAPED:
        return p.numel() * state_dtype(p, options["state_dtype"]).itemsize
    return p.numel() // min(p.shape[-2:]) * p.element_size()  # a vector over the tall side
