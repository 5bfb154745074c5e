"""Whether low rank pays, why it saves less, what to change where a run does not fit: plain sentences with numbers."""

from collections.abc import Sequence
from typing import Any

from nativerank.accounting.hardware import Device
from nativerank.layers import FactorizeReport
from nativerank.layers.report import FactorizeEntry
from nativerank.plan.memory import largest_component
from nativerank.plan.subject import Subject

DOMINATED, OPTIMIZER_SHARE, LITTLE = 0.5, 0.05, 0.9  # shares above which something is said

REMEDIES = {
    "activations": "smaller train.batch_size, or train.recompute",
    "working": "smaller train.batch_size",
    "optimizer": "optim.state_dtype bf16, or more parallel.shards",
    "gradients": "optim.layerwise, or more parallel.shards",
    "weights": "a smaller rank, or more parallel.shards",
    "gathered": "parallel.reshard_after_forward, or parallel.precision bf16",
    "buckets": "parallel.mode fsdp",
    "diloco": "more processes, or parallel.diloco.every 0",
    "buffers": "a shorter train.context",
}


def verdict(
    planned: Subject, report: FactorizeReport | None, plan: dict[str, Any], device: Device
) -> dict[str, list[str]]:
    """Whether low rank pays by time beside its dense twin, and why it saves less than it could.

    Returns:
        `will_not_pay`: a step takes the twin's time or more, with ranks at or above break-even named there; also these
        ranks where there is no twin. `pays_little`: it takes above 0.9. `saves_less`: causes, whatever they cost.
    """
    found: dict[str, list[str]] = {"will_not_pay": [], "pays_little": [], "saves_less": []}
    if planned.dense:
        return found
    entries = report.entries if report else ()
    ratio, outside = ratio_to_twin(plan), outside_of_matrices(plan)
    if ratio is not None and ratio > LITTLE:
        found["will_not_pay" if ratio >= 1 else "pays_little"].append(beside_twin(planned, plan, ratio, device))
    elif outside > DOMINATED:
        found["saves_less"].append(head_share(outside))
    found["will_not_pay" if ratio is None or ratio >= 1 else "saves_less"] += above_break_even(entries)
    found["saves_less"] += optimizer_share(planned, plan)
    thin = thin_products(entries, device)
    found["saves_less"] += [thin] if thin else []
    return found


def ratio_to_twin(plan: dict[str, Any]) -> float | None:
    """Seconds of a step over those of the dense twin; None where there is none."""
    dense = plan.get("dense")
    return plan["time"]["seconds_per_step"] / dense["time"]["seconds_per_step"] if dense else None


def outside_of_matrices(plan: dict[str, Any]) -> float:
    """Share of attention and head in the exact FLOPs of a forward pass."""
    token = plan["flops"]["per_token"]
    return float((token["of_forward"]["attention"] + token["of_forward"]["head"]) / token["forward"])


def head_share(outside: float) -> str:
    """What no rank changes."""
    return f"attention and head are {outside:.0%} of the exact FLOPs of a forward pass, which no rank makes smaller"


def beside_twin(planned: Subject, plan: dict[str, Any], ratio: float, device: Device) -> str:
    """One sentence for a step that takes about as long as its dense twin's, with the reason."""
    flops = plan["flops"]["per_token"]["exact"] / plan["dense"]["flops"]["per_token"]["exact"]
    outside = outside_of_matrices(plan)
    own, twin = plan["time"], plan["dense"]["time"]
    without = ratio * (1 - own["optimizer_share"]) / (1 - twin["optimizer_share"])
    if outside > DOMINATED:
        why = head_share(outside)
    elif without <= LITTLE:
        why = f"without the optimizers' updates it would take {without:.2f}"
    else:
        number = f"{planned.sequences} sequence" + ("" if planned.sequences == 1 else "s")
        why = f"width {planned.width()} and passes of {number} are too small for it"
    takes = (
        f"takes {ratio:.2f} of its dense twin's time" if ratio >= 1 else f"is {1 - ratio:.0%} shorter than its twin's"
    )
    return f"by the roofline of {device.name} a step {takes}, with {flops:.2f} of the twin's exact FLOPs: {why}"


def above_break_even(entries: Sequence[FactorizeEntry]) -> list[str]:
    """Matrices whose factors are no smaller than they were."""
    larger = [entry for entry in entries if entry.larger]
    if not larger:
        return []
    return [
        f"{len(larger)} of {len(entries)} kinds of matrices have ranks at or above break-even, the first "
        f"{larger[0].name} with rank {larger[0].rank}: their factors are no smaller than the matrix"
    ]


def optimizer_share(planned: Subject, plan: dict[str, Any]) -> list[str]:
    """Whether a step has too few tokens for its optimizer, by FLOPs and by the roofline."""
    by_flops, by_time = plan["flops"]["optimizer_over_exact"], plan["time"]["optimizer_share"]
    if max(by_flops, by_time) <= OPTIMIZER_SHARE:
        return []
    enough = plan["flops"]["optimizer_per_step"] / plan["flops"]["per_token"]["exact"] / OPTIMIZER_SHARE
    return [
        f"the optimizer is {by_flops:.1%} of forward and backward by exact FLOPs and {by_time:.1%} of the step by the "
        f"roofline: {planned.tokens_per_step:,} tokens per step are few for it"
        + (f" ({enough:,.0f} bring its FLOPs to {OPTIMIZER_SHARE:.0%})" if by_flops > OPTIMIZER_SHARE else "")
    ]


def thin_products(entries: Sequence[FactorizeEntry], device: Device) -> str | None:
    """Products (tokens, d) times (d, r) do at most r FLOPs per byte in bfloat16, r / 2 in float32, at any batch."""
    if not entries:
        return None
    rank = sorted(entry.rank for entry in entries)[len(entries) // 2]
    per_byte = rank / 2 if device.on_cpu else rank
    balance = device.product_flops / device.bytes_per_second
    if per_byte >= balance:
        return None
    return (
        f"rank {rank} gives its products at most {per_byte:.0f} FLOPs per byte, and {device.name} needs {balance:.0f} "
        "to be busy: they wait for memory, so time falls by less than FLOPs"
    )


def what_to_change(planned: Subject, parts: dict[str, int], memory: int) -> str | None:
    """One sentence for a plan that does not fit: what takes most, and what makes it smaller."""
    if parts["peak"] <= memory:
        return None
    name = largest_component(parts)
    remedy = REMEDIES[name]
    if name == "activations" and planned.config.train.recompute == "none":
        remedy = "train.recompute up or blocks, or a smaller train.batch_size"
    elif name == "activations":
        remedy = "a smaller train.batch_size or train.context"
    return (
        f"does not fit: {parts['peak'] / 1e9:.1f} GB of {memory / 1e9:.1f} GB; most of it is {name}, "
        f"{parts[name] / 1e9:.1f} GB: {remedy}"
    )
