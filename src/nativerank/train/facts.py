"""The rows that a run writes: how it starts, what a step was, how it ended."""

import functools
from pathlib import Path
from typing import Any

import torch

from nativerank.accounting.hardware import present_device
from nativerank.evaluate.loss import Loss
from nativerank.layers import linear_modules
from nativerank.layers.base import factor_layers
from nativerank.models import count_parameters
from nativerank.train.closing import peak_memory_bytes, xz_of_validation
from nativerank.train.diloco import notes
from nativerank.train.setup import versions
from nativerank.train.state import RunState
from nativerank.train.step import StepResult


def start_facts(run: RunState, device: torch.device, resumed: Path | None) -> dict[str, Any]:
    """What is about to run, from which checkpoint if any."""
    c = run.config
    facts = {
        "event": "resume" if resumed else "start",
        "step": run.step,
        "method": c.method,
        "model": c.init or c.model.config or c.model.preset,
        "parameters": count_parameters(run.model),
        "factorized": len(factor_layers(run.model)),
        "left_dense": len(linear_modules(run.model)),
        "warnings": [
            *notes(c, run.steps),
            *(f"{e.name}: {e.warning}" for e in (run.report.entries if run.report else ()) if e.warning),
        ],
        "steps": run.steps,
        "tokens_per_step": run.tokens_per_step,
        "train_tokens": run.dataset.split("train").tokens,
        "ranks": run.ranks.ranks.now,
        "lr": c.optim.lr,
        "aux_lr": c.optim.aux_lr,
        "device": str(device),
        "out": str(run.out),
        "environment": versions(),
    }
    if resumed:
        facts["checkpoint"] = str(resumed)
    if run.teacher:
        facts["teacher"] = c.distill.teacher
    if run.grid.world > 1:
        facts |= {"replicas": run.grid.replicas, "shards": run.grid.shards, "uneven": run.uneven}
    return facts


def step_row(
    run: RunState, result: StepResult, alpha: float | None, rate: float, seconds: float, measured: bool
) -> dict[str, Any]:
    """The step that was just made.

    Args:
        alpha: weight of the guides in it. rate: share of the peak rates. seconds: it took.
        measured: the seconds of its phases mean something.
    """
    o = run.config.optim
    row: dict[str, Any] = {
        "step": run.step,
        "tokens": run.step * run.tokens_per_step,
        "loss": result.loss,
        "lr": (o.lr or 0) * rate,
        "aux_lr": (o.aux_lr or 0) * rate,
        "grad_norm": result.grad_norm,
        "tokens_per_second": run.tokens_per_step / seconds,
        "seconds": seconds,
        "train_flops": run.train_flops,
    }
    if result.distill_loss is not None:
        row["distill_loss"] = result.distill_loss
    if alpha is not None:
        row["guide_alpha"] = alpha
    if measured:
        row["optimizer_share"] = result.seconds["optimizer"] / sum(result.seconds.values())
    if next(run.model.parameters()).is_cuda:
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if result.kept:
        row["kept"] = result.kept
    return row


@functools.cache
def peak_flops() -> float | None:
    """Peak of one device of this machine for bfloat16 products, None for one that no table has."""
    device = present_device()
    return None if device is None else device.product_flops


def utilization(run: RunState, flops: float, seconds: float) -> dict[str, float]:
    """`mfu` of this time: exact FLOPs of forward and backward, without recomputation, over what all devices could have
    done; nothing where their peak is not known.

    Args:
        flops: of all processes. seconds: that they took.
    """
    peak = peak_flops() if next(run.model.parameters()).is_cuda else None
    return {"mfu": flops / (peak * run.grid.world * seconds)} if peak and seconds else {}


def summary_row(
    run: RunState, device: torch.device, loss: Loss, prompt: str, sample: str, seconds: float
) -> dict[str, Any]:
    """How the run ended: the loss on the whole validation split, a sample, what it took."""
    return {
        "event": "end",
        "step": run.step,
        "tokens": run.step * run.tokens_per_step,
        "val_loss": loss.nats,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
        "xz_bits_per_byte": xz_of_validation(run.dataset),
        "val_tokens": loss.tokens,
        "prompt": prompt,
        "sample": sample,
        "refused_steps": run.guard.refused,
        "parameters": count_parameters(run.model),
        "train_flops": run.train_flops,
        "ranks": run.ranks.ranks.now,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
        "out": str(run.out),
    }
