"""One update: forward and backward over the micro-batches, clipping, the optimizer. No input or output.

The caller may look at the loss and the gradient norm before the optimizer moves anything, and refuse. In layer-wise
updating (`optim.layerwise`) it may look at the loss only: from then on the weights move as gradients come.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nativerank.distributed.gradients import clip as clip_gradients
from nativerank.distributed.gradients import local_gradients, loss_and_norms
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.wrap import gradient_sync
from nativerank.evaluate.loss import autocast, mean_loss
from nativerank.linalg.scope import mark
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.train.distill import Objective, Teacher

Batch = tuple[Tensor, Tensor, Tensor | None]  # inputs, targets, positions or None; each (batch, context)


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The numbers on a device, for which the host does not wait: a GPU copies them from pinned memory in its turn.

    PyTorch gives pinned memory to another tensor only when the copy from it is done.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass
class StepResult:
    """loss in nats per token, gradient norm before clipping, seconds per phase, and whether the weights moved.

    The loss is the cross entropy, with a teacher or without; `distill_loss` is how far from the teacher the model is.
    `kept`: parameters that a refused layer-wise step had moved already, and that stay so. `votes`: sums over all
    processes.
    """

    loss: float
    grad_norm: float
    seconds: dict[str, float]
    updated: bool
    kept: int = 0
    votes: Sequence[float] = ()
    distill_loss: float | None = None


class Stopwatch:
    """Seconds per phase; waits for the device at each mark only if told to, so that timing costs nothing otherwise."""

    clock = staticmethod(time.perf_counter)  # benchmarks on a busy machine take processor time

    def __init__(self, device: torch.device, wait: bool):
        self.wait = wait and device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.last = self._now()
        mark("begin")

    def mark(self, phase: str) -> None:
        mark(phase)
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def _now(self) -> float:
        if self.wait:
            torch.cuda.synchronize()
        return self.clock()


def objective(model: nn.Module, batch: Batch, teacher: Teacher | None, chunked: bool = True) -> Objective:
    """The training loss of a batch, with a teacher or without; `chunked` as of `mean_loss`."""
    if teacher is not None:
        return teacher.objective(model, *batch)
    loss = mean_loss(model, *batch, chunked=chunked)
    return Objective(loss, loss.detach(), None)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    accumulation: int,
    clip: float,
    *,
    accept: Callable[[float, float], bool] = lambda loss, grad_norm: True,
    time_phases: bool = True,
    grid: Grid = SINGLE,
    apart: bool = False,
    votes: Sequence[float] = (),
    teacher: Teacher | None = None,
    chunked: bool = True,
) -> StepResult:
    """Moves the weights once along the mean gradient of `accumulation` micro-batches.

    Args:
        model: causal LM in training mode; for many processes as `distributed.wrap` returns it.
        optimizer: its gradients are cleared before, and left in place after.
        batches: the micro-batches, on the model's device; of this process, and equally many and large on all.
        accumulation: how many there are.
        clip: largest global gradient norm, 0 for no clipping.
        accept: asked with the loss and the unclipped norm before the optimizer runs; False leaves the weights alone.
        time_phases: on CUDA, synchronise so that the phases' seconds mean something.
        grid: of all processes; loss and norm are those of all of them together.
        apart: replicas of the grid keep gradients of their own, and are clipped by their own norms.
        votes: of this process, summed over all in the exchange that is made anyway.
        teacher: whose predictions are learned too.
        chunked: never hold the logits of all tokens, where model and objective allow it.
    """
    device = next(model.parameters()).device
    watch = Stopwatch(device, time_phases)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    distilled = [] if teacher is None else [torch.zeros((), device=device)]
    for index, batch in enumerate(batches):
        with gradient_sync(model, last=index == accumulation - 1):
            with autocast(device):
                loss, cross_entropy, divergence = objective(model, batch, teacher, chunked)
            watch.mark("forward")
            (loss / accumulation).backward()
        total += cross_entropy / accumulation
        if divergence is not None:
            distilled[0] += divergence / accumulation
        watch.mark("backward")
    if grid.world == 1:
        norm = torch.nn.utils.get_total_norm(local_gradients(model.parameters()))
        found = [x.to(device) for x in (total, norm, *distilled)]
        value, grad_norm, *apart_by = torch.stack(found).tolist()  # in one read: here the host waits for its device
        clip_gradients(model.parameters(), grad_norm, clip or float("inf"))
    else:
        count, named = len(votes), list(model.named_parameters())
        value, norms, sums = loss_and_norms(total, named, grid, [*votes, *distilled], apart)
        votes, apart_by = sums[:count], [one / grid.world for one in sums[count:]]
        grad_norm = math.fsum(norms) / len(norms)
        clip_gradients((p for _, p in named), norms[grid.replica if apart else 0], clip or float("inf"))
    watch.mark("clip")
    updated = accept(value, grad_norm)
    if updated:
        optimizer.step()
    watch.mark("optimizer")
    distill_loss = apart_by[0] if apart_by else None
    return StepResult(value, grad_norm, watch.seconds, updated, votes=votes, distill_loss=distill_loss)


def layerwise_step(
    model: nn.Module,
    optimizer: LowRankOptimizer,
    batches: Iterable[Batch],
    accept_loss: Callable[[float], bool],
    accept: Callable[[float, float], bool],
    refuse: bool,
    time_phases: bool = True,
    teacher: Teacher | None = None,
    chunked: bool = True,
) -> StepResult:
    """Moves the weights once, each part inside the backward pass as soon as its gradients are there.

    Args:
        model: causal LM in training mode.
        optimizer: of which `update_layerwise` was called; no gradient is left after.
        batches: one, on the model's device.
        accept_loss: asked before the backward pass; False leaves the weights alone.
        accept: asked with the norm of the gradients when most of them have been used up; its answer is reported.
        refuse: end the updates at the first gradient that is not finite, which costs a look at each.
        time_phases: on CUDA, synchronise so that the phases' seconds mean something.
        teacher: whose predictions are learned too.
        chunked: never hold the logits of all tokens, where model and objective allow it.
    """
    layerwise, device = optimizer.layerwise, next(model.parameters()).device
    assert layerwise is not None
    watch = Stopwatch(device, time_phases)
    optimizer.zero_grad(set_to_none=True)
    layerwise.watch(measure=True, refuse=refuse, mark=watch.mark)
    (batch,) = batches
    with autocast(device):
        loss, cross_entropy, divergence = objective(model, batch, teacher, chunked)
    value, distill_loss = cross_entropy.item(), None if divergence is None else divergence.item()
    watch.mark("forward")
    if not accept_loss(value):
        seconds = {**watch.seconds, "optimizer": 0.0}
        return StepResult(value, float("nan"), seconds, False, distill_loss=distill_loss)
    loss.backward()
    watch.mark("backward")
    grad_norm = layerwise.grad_norm(model.parameters()).item()
    watch.mark("clip")
    updated = accept(value, grad_norm) and not layerwise.refused
    if updated:
        optimizer.step()
    else:
        layerwise.finish()
    watch.mark("optimizer")
    kept = 0 if updated else layerwise.moved
    return StepResult(value, grad_norm, watch.seconds, updated, kept=kept, distill_loss=distill_loss)
