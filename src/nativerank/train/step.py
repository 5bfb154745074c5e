"""One update: forward and backward over the micro-batches, clipping, the optimizer. No input or output.

The caller may look at the loss and the gradient norm before the optimizer moves anything, and refuse. In layer-wise
updating (`optim.layerwise`) it may look at the loss only: from then on the weights move as gradients come.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nativerank.distributed.gradients import clip as clip_gradients
from nativerank.distributed.gradients import loss_and_norms
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.wrap import gradient_sync
from nativerank.evaluate.loss import autocast, token_losses
from nativerank.optim.optimizer import LowRankOptimizer

Batch = tuple[Tensor, Tensor, Tensor | None]  # inputs, targets, positions or None; each (batch, context)


@dataclass
class StepResult:
    """loss in nats per token, gradient norm before clipping, seconds per phase, and whether the weights moved.

    `kept`: parameters that a refused layer-wise step had moved already, and that stay so. `votes`: sums over all
    processes.
    """

    loss: float
    grad_norm: float
    seconds: dict[str, float]
    updated: bool
    kept: int = 0
    votes: Sequence[float] = ()


class Stopwatch:
    """Seconds per phase; waits for the device at each mark only if told to, so that timing costs nothing otherwise."""

    def __init__(self, device: torch.device, wait: bool):
        self.wait = wait and device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.last = self._now()

    def mark(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def _now(self) -> float:
        if self.wait:
            torch.cuda.synchronize()
        return time.perf_counter()


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
    """
    device = next(model.parameters()).device
    watch = Stopwatch(device, time_phases)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    for index, (inputs, targets, positions) in enumerate(batches):
        with gradient_sync(model, last=index == accumulation - 1):
            with autocast(device):
                loss = token_losses(model, inputs, targets, positions).mean() / accumulation
            watch.mark("forward")
            loss.backward()
        total += loss.detach()
        watch.mark("backward")
    if grid.world == 1:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        value, grad_norm = total.item(), norm.item()
    else:
        value, norms, votes = loss_and_norms(total, model.parameters(), grid, votes, apart)
        grad_norm = math.fsum(norms) / len(norms)
        clip_gradients(model.parameters(), norms[grid.replica if apart else 0], clip or float("inf"))
    watch.mark("clip")
    updated = accept(value, grad_norm)
    if updated:
        optimizer.step()
    watch.mark("optimizer")
    return StepResult(value, grad_norm, watch.seconds, updated, votes=votes)


def layerwise_step(
    model: nn.Module,
    optimizer: LowRankOptimizer,
    batches: Iterable[Batch],
    accept_loss: Callable[[float], bool],
    accept: Callable[[float, float], bool],
    refuse: bool,
    time_phases: bool = True,
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
    """
    layerwise, device = optimizer.layerwise, next(model.parameters()).device
    assert layerwise is not None
    watch = Stopwatch(device, time_phases)
    optimizer.zero_grad(set_to_none=True)
    layerwise.watch(measure=True, refuse=refuse, mark=watch.mark)
    ((inputs, targets, positions),) = batches
    with autocast(device):
        loss = token_losses(model, inputs, targets, positions).mean()
    value = loss.item()
    watch.mark("forward")
    if not accept_loss(value):
        return StepResult(value, float("nan"), {**watch.seconds, "optimizer": 0.0}, False)
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
    return StepResult(value, grad_norm, watch.seconds, updated, kept=0 if updated else layerwise.moved)
