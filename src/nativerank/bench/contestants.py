"""Who takes part in `nativerank bench train`: a method of ours with switches, or a stock dense model.

    spectron                     the method as `nativerank train` runs it
    spectron+compile+up          with compiled blocks and train.recompute up
    hf-dense                     LlamaForCausalLM as it comes: its own loss, torch.optim.AdamW(fused=True), no compiling

| switch | what |
|---|---|
| compile | compiled blocks |
| up, blocks | `train.recompute` |
| whole | `train.loss whole`: the logits of all tokens at once |
| apart | `down` products of one input each by itself |

Ours run the loop's own `train_step`.
"""

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from nativerank.bench.measure import check_sizes
from nativerank.config import GuideConfig
from nativerank.evaluate.loss import autocast
from nativerank.layers import join_products
from nativerank.methods import build_optimizer, factorize, find_method
from nativerank.models import Preset, hf_config, materialize, skeleton
from nativerank.train.compiled import compile_blocks
from nativerank.train.recompute import recompute_blocks
from nativerank.train.step import Batch, Stopwatch, train_step

PHASES = ("forward", "backward", "clip", "optimizer")
HF_DENSE = "hf-dense"
SWITCHES = ("compile", "up", "blocks", "whole", "apart")
CLIP = 1.0


class Contestant(Protocol):
    """A model on a device, and what one update of it takes."""

    name: str
    model: nn.Module

    def step(self, batch: Batch, wait: bool = True) -> dict[str, float]:
        """One update; seconds per phase, which on CUDA mean something only if each is waited for."""


def split_name(name: str) -> tuple[str, list[str]]:
    """The method and its switches.

    Raises:
        ValueError: an unknown method or switch, or switches that exclude each other.
    """
    method, *switches = name.split("+")
    if method != HF_DENSE:
        find_method(method)
    for switch in switches:
        if switch not in SWITCHES or method == HF_DENSE:
            known = "none" if method == HF_DENSE else ", ".join(SWITCHES)
            raise ValueError(f"{name}: unknown switch {switch!r} (of {method}: {known})")
    if {"up", "blocks"} <= set(switches) or ("up" in switches and find_method(method).layer is None):
        raise ValueError(f"{name}: up is for factors, and one of up and blocks at most")
    return method, switches


def to_stderr(message: str) -> None:
    """Standard output is for results."""
    print(message, file=sys.stderr, flush=True)


def make(name: str, preset: Preset, device: torch.device, say: Callable[[str], None] = to_stderr) -> Contestant:
    """The contestant of this name; same name, same weights. Guides of self-guided are those of a run's beginning.

    Args:
        preset: its shapes. say: told what does not compile as one graph.
    """
    method, switches = split_name(name)
    if method == HF_DENSE:
        return Stock(preset, device)
    return Ours(name, method, switches, preset, device, say)


class Ours:
    """A row of the method table."""

    def __init__(
        self,
        name: str,
        method: str,
        switches: list[str],
        preset: Preset,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self.name, self.chunked = name, "whole" not in switches
        model, row = skeleton(hf_config(preset)), find_method(method)
        if row.layer:
            factorize(model, method, rank_ratio=preset.ratio, rank=preset.value)
        self.model = materialize(model, seed=0, init_scale=row.rates.init_scale, init="sampled").to(device).train()
        if "apart" not in switches:
            join_products(self.model)
        for policy in {"up", "blocks"} & set(switches):
            recompute_blocks(self.model, policy)
        guided_steps = round(GuideConfig().share * preset.steps) if row.guided else None
        self.optimizer = build_optimizer(self.model, method, guided_steps=guided_steps)
        if "compile" in switches:
            compile_blocks(self.model, say)

    def step(self, batch: Batch, wait: bool = True) -> dict[str, float]:
        result = train_step(
            self.model, self.optimizer, [batch], accumulation=1, clip=CLIP, chunked=self.chunked, time_phases=wait
        )
        return {phase: result.seconds[phase] for phase in PHASES}


class Stock:
    """What one gets from transformers and PyTorch without further thought."""

    name = HF_DENSE

    def __init__(self, preset: Preset, device: torch.device):
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        stock: Any = LlamaForCausalLM(hf_config(preset))
        self.model: Any = stock.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=device.type != "mps")
        self.device = device

    def step(self, batch: Batch, wait: bool = True) -> dict[str, float]:
        watch = Stopwatch(self.device, wait=wait)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        watch.mark("forward")
        loss.backward()
        watch.mark("backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        watch.mark("clip")
        self.optimizer.step()
        loss.item()
        watch.mark("optimizer")
        return watch.seconds


def check_batch(tokens: int | None, context: int) -> None:
    """Raises a ValueError for a step that is no whole number of sequences."""
    check_sizes(tokens=tokens)
    if tokens is not None and tokens % context:
        raise ValueError(f"--tokens must be a multiple of the context, {context}, got {tokens}")
