"""When low rank will not pay, and what to change where a run does not fit: plain sentences, each with its number."""

from typing import Any

from nativerank.accounting.hardware import Device
from nativerank.layers import FactorizeReport
from nativerank.plan.memory import largest_component
from nativerank.plan.subject import Subject

DOMINATED, OPTIMIZER_SHARE, SMALL_GAIN = 0.5, 0.05, 0.9  # shares above which something is said

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


def will_not_pay(planned: Subject, report: FactorizeReport | None, plan: dict[str, Any], device: Device) -> list[str]:
    """Reasons against low rank for this plan, beside its dense twin where that is known; empty if none was found."""
    found: list[str] = []
    entries = report.entries if report else ()
    larger = [entry for entry in entries if entry.larger]
    if larger:
        found.append(
            f"{len(larger)} of {len(entries)} kinds of matrices have ranks at or above break-even, the first "
            f"{larger[0].name} with rank {larger[0].rank}: their factors are no smaller than the matrix"
        )
    token = plan["flops"]["per_token"]
    outside = (token["of_forward"]["attention"] + token["of_forward"]["head"]) / token["forward"]
    if outside > DOMINATED:
        found.append(
            f"attention and head are {outside:.0%} of the exact FLOPs of a forward pass, which no rank makes smaller"
        )
    found += optimizer_share(planned, plan)
    thin = thin_products(entries, device)
    found += [thin] if thin else []
    dense = plan.get("dense")
    if dense:
        ratio = plan["time"]["seconds_per_step"] / dense["time"]["seconds_per_step"]
        flops = token["exact"] / dense["flops"]["per_token"]["exact"]
        if ratio > SMALL_GAIN:
            found.append(
                f"by the roofline of {device.name} a step takes {ratio:.2f} of its dense twin's time, though exact "
                f"FLOPs are {flops:.2f} of the twin's: width {planned.width()} and {planned.sequences} sequences "
                "of a pass are too small for it"
            )
    return found


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


def thin_products(entries: Any, device: Device) -> str | None:
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
