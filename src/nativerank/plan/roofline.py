"""The shortest time that a device could take: for every call of an operator the larger of two bounds.

    seconds = sum over calls of max(FLOPs / peak, bytes read and written / bandwidth)

Products of forward and backward meet the bfloat16 peak on a GPU and the float32 peak on a CPU; the optimizer's, which
run in float32, the float32 peak. A bound, not a forecast: kernels that start late, products that are thin, links
between devices and caches that hold what was just written are left out. `efficiency` is how much of the bound one
reckons with; 1 is the bound itself.
"""

from collections.abc import Sequence
from typing import Any

from nativerank.accounting.hardware import Device
from nativerank.accounting.trace import OPTIMIZER, Op


def phase_seconds(ops: Sequence[Op], device: Device) -> dict[str, float]:
    """Seconds of each phase, at least."""
    found: dict[str, float] = {}
    for op in ops:
        peak = device.fp32_flops if op.phase == OPTIMIZER else device.product_flops
        seconds = op.calls * max(op.flops / peak, op.bytes / device.bytes_per_second)
        found[op.phase] = found.get(op.phase, 0.0) + seconds
    return found


def step_time(
    ops: Sequence[Op],
    device: Device,
    *,
    passes: int,
    tokens_per_step: int,
    exact_flops: float,
    world: int,
    efficiency: float,
) -> dict[str, Any]:
    """Seconds of a step and what follows from them.

    Args:
        ops: of one pass of one process, and of one step of its optimizer.
        passes: forward and backward passes per step.
        tokens_per_step: of all processes. exact_flops: per token, for MFU.
        world: processes, one device each.
        efficiency: share of the roofline that is reckoned with.
    """
    phases = phase_seconds(ops, device)
    step = sum(seconds * (1 if phase == OPTIMIZER else passes) for phase, seconds in phases.items()) / efficiency
    return {
        "seconds_per_step": step,
        "seconds_per_pass": {phase: s / efficiency for phase, s in phases.items() if phase != OPTIMIZER},
        "optimizer_seconds": phases.get(OPTIMIZER, 0.0) / efficiency,
        "optimizer_share": phases.get(OPTIMIZER, 0.0) / efficiency / step,
        "tokens_per_second": tokens_per_step / step,
        "mfu": exact_flops * tokens_per_step / (step * world * device.product_flops),
    }


def run_time(seconds_per_step: float, steps: int, world: int, price: float | None) -> dict[str, float]:
    """Hours, device hours and, where a price per device hour is known, the cost of a run."""
    hours = seconds_per_step * steps / 3600
    cost = {} if price is None else {"cost": hours * world * price}
    return {"hours": hours, "device_hours": hours * world, **cost}
