"""Memory and traffic of a training step on a grid of processes, from shapes: nothing is allocated and nothing sent.

A grid has N = R S processes, R replicas of S shards. Bytes are what one process sends in a step; a message counts once,
for its sender, and what stays in a process is free. For B bytes, all of a tensor:

| phase | bytes sent per process |
|---|---|
| FSDP all-gather, forward; again backward where blocks were let go | B (S - 1) / S |
| FSDP reduce-scatter of gradients (a ring) | B (S - 1) / S |
| all-reduce of gradients over replicas (a ring; DDP is S = 1) | 2 B / S (R - 1) / R |
| optimizer, `gram` and `owner` | see `optim.traffic`, which has the formulas of both |
| optimizer, gathering Muon | B (S - 1) / S: whole momenta on every process, which solves every matrix |

With accumulation the first two phases are those of every pass, the others of the last one alone.

FSDP2 pads shards to equal size, and B is counted with that padding; the shards of `owner` are padded to 8 bytes each,
which is left out. Owners are spread by cost, which is never quite even: figures are means over processes, those called
largest the most of any process, for which the step waits.

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
from nativerank.optim.float8 import SCALES, scale_shape
from nativerank.optim.gram_rules import refusal
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.precision import kept_as, state_dtype
from nativerank.optim.rules import RULES, SMALL, WEIGHT_SHAPED, elementwise_states
from nativerank.optim.traffic import choose, row_counts, sent_bytes
from nativerank.optim.units import ALGEBRAS, GRAM, Unit, assign, units_of

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
    """The optimizer's traffic by phase, state and r x r FLOPs: of a process on average, and the largest of any."""
    units = units_of(groups)
    assign(units, grid, lambda unit: choose(unit, groups[unit.group], grid, algebra))
    phases = phase_bytes(units, groups, grid)
    total = sum(phases.values(), torch.zeros(()))
    state = state_bytes(groups, units, grid)
    flops = torch.zeros(grid.world, dtype=torch.float64)
    for unit in units:
        flops[unit.owner] += solve_flops(unit.members, groups[unit.group])
    return {
        "bytes": {**{name: sizes.mean().item() for name, sizes in phases.items()}, "total": total.mean().item()},
        "largest_bytes": total.max().item(),
        "state_bytes": state.mean().item(),
        "largest_state_bytes": state.max().item(),
        "owned_copies_bytes": owned_copies(units, grid).mean().item(),
        "r_by_r_flops": flops.mean().item(),
        "largest_r_by_r_flops": flops.max().item(),
        "matrices": dict(Counter(unit.algebra for unit in units)),
    }


def phase_bytes(units: Sequence[Unit], groups: Groups, grid: Grid) -> dict[str, Tensor]:
    """What every process sends in a step of the optimizer, (replicas, shards) each: `sent_bytes` of all units."""
    found = torch.zeros(3, grid.replicas, grid.shards, dtype=torch.float64)
    for unit in units:
        found += sent_bytes(unit, groups[unit.group], grid, unit.algebra)
    return dict(zip(("before", "to_owners", "back"), found, strict=True))


def gathering_scale(groups: Groups, grid: Grid) -> dict[str, Any]:
    """The same for a Muon that gathers whole momenta and solves every matrix on every process."""
    units = units_of(groups)
    gathered = sum(
        padded_shard(p, grid.shards) * p.element_size() * (grid.shards - 1)
        for unit in units
        for p in unit.members
        if cut_along(p) is not None
    )
    everything = float(sum(solve_flops(unit.members, groups[unit.group]) for unit in units))
    return {
        "bytes": {"before": 0.0, "to_owners": float(gathered), "back": 0.0, "total": float(gathered)},
        "r_by_r_flops": everything,
        "largest_r_by_r_flops": everything,
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


def state_bytes(groups: Groups, units: Iterable[Unit], grid: Grid) -> Tensor:
    """Bytes of optimizer state on every process (N,), whole copies of owned weights included."""
    everywhere, by_shard = 0, torch.zeros(grid.shards, dtype=torch.float64)
    by_rank = torch.zeros(grid.world, dtype=torch.float64)

    def spread(p: Tensor, size: int) -> None:
        along = cut_along(p)
        rows = 1 if along is None else p.shape[along]
        by_shard.add_(row_counts(rows, grid.shards) * (size // rows) if along is not None else size)

    for group in groups:
        if RULES[group["rule"]].kind == "elementwise":
            for p in group["params"]:
                everywhere += kept_bytes("step", p, group)
                for name in set(elementwise_states(p, group["state_dtype"])) - {"step"}:
                    spread(p, kept_bytes(name, p, group))
    for unit in units:
        group, gram = groups[unit.group], unit.algebra == GRAM
        for position, p in enumerate(unit.members):
            for name in RULES[group["rule"]].state_of(position):
                size = kept_bytes(name, p, group if position < 2 else {**group, "state_dtype": "fp32"})
                if not gram or position == 2 or name in SMALL:
                    by_rank[unit.owner] += size
                    everywhere += size if gram and name in SMALL else 0  # its inverse
                elif name == "step":
                    everywhere += size
                else:
                    spread(p, size)
            if gram and position == 2:
                everywhere += p.numel() * p.element_size()
    return everywhere + by_shard.repeat(grid.replicas) + by_rank + owned_copies(units, grid)


def owned_copies(units: Iterable[Unit], grid: Grid) -> Tensor:
    """Bytes on every process (N,) of whole weights beside their shards: with `owner` it keeps what it steps."""
    found = torch.zeros(grid.world, dtype=torch.float64)
    for unit in units:
        if unit.algebra != GRAM:
            whole = (p for p in unit.members if cut_along(p) is not None)
            found[unit.owner] += sum(p.numel() * p.element_size() for p in whole)
    return found


def kept_bytes(name: str, p: Tensor, options: Mapping[str, Any]) -> int:
    """Bytes of one state tensor of a whole parameter."""
    if name == "step":
        return torch.float32.itemsize
    if name in SMALL:
        return min(p.shape[-2:]) ** 2 * torch.promote_types(p.dtype, torch.float32).itemsize
    if name in WEIGHT_SHAPED:
        return p.numel() * state_dtype(p, kept_as(p, options["state_dtype"])).itemsize
    if name in SCALES:
        return prod(scale_shape(p)) * torch.float32.itemsize
    return p.numel() // min(p.shape[-2:]) * p.element_size()  # a vector over the tall side


def held_state_bytes(optimizer: LowRankOptimizer) -> int:
    """What of the same this process really holds."""
    sharded, rows = optimizer.layout.sharded, optimizer.layout.rows()
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    tensors += [] if sharded is None else list(sharded.kept.values())
    tensors += [state["R_inverse"] for one in rows for state in one.bucket.states if "R_inverse" in state]
    return sum(t.nbytes for t in tensors)
