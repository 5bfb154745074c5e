"""The stack that `bench step70b` trains: LLaMA-3-70B's hidden matrices as U diag(s) V^T, nothing else.

    simplified   the SCT paper's: x + o(q h + k h + v h), h = RMSNorm(x); then SwiGLU. No heads, no softmax.
    real         transformers' Llama: rotary positions, causal softmax, grouped keys and values

No embedding, no head, no final norm; random inputs; the loss is the sum of the outputs. A step of it costs what a step
costs and teaches nothing. `Session` makes such steps and times their phases, layer-wise with recomputed blocks or not.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nativerank.accounting.memory import llama_shapes
from nativerank.layers import SpectralLinear
from nativerank.layers.base import factor_layers
from nativerank.linalg.retract import retract
from nativerank.methods import build_optimizer, factorize
from nativerank.models import allocate, find_preset, hf_config, skeleton
from nativerank.optim.frames import marked
from nativerank.train.closing import peak_memory_bytes

PRESET = "llama3-70b"
STATES = ("fp32", "bf16", "momentum-bf16")
PHASES = ("forward", "backward", "optimizer", "retraction")


@dataclass(frozen=True)
class Variant:
    """One way to train the stack.

    Args:
        layerwise: update inside the backward pass, with recomputed blocks.
        state: "fp32" and "bf16" are Adam's moments (method sct), "momentum-bf16" is stiefel-spectron's momentum.
        gqa: 8 key and value heads for 64 query heads, as the model has them; the paper's stack has 64.
        attention: "simplified" or "real".
        tokens: of the one sequence.
        layers: blocks. rank: of every matrix.
        d_model, d_ffn, heads: sizes; None takes the preset's.
    """

    layerwise: bool = False
    state: str = "fp32"
    gqa: bool = False
    attention: str = "simplified"
    tokens: int = 16
    layers: int = 80
    rank: int = 32
    d_model: int = 8192
    d_ffn: int = 28672
    heads: int = 64

    @property
    def kv_width(self) -> int:
        """Width of keys and values."""
        preset = find_preset(PRESET)
        assert preset.kv_heads
        return self.d_model * preset.kv_heads // preset.heads if self.gqa else self.d_model


class Block(nn.Module):
    """A block of the paper's stack; narrower keys and values are repeated to the full width."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module

    def __init__(self, shapes: dict[str, tuple[int, int]], rank: int, d_model: int):
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        for name, (d_in, d_out) in shapes.items():
            self.add_module(name, SpectralLinear(d_in, d_out, rank, device="meta"))
        self.repeats = d_model // shapes["k"][1]

    def forward(self, x: Tensor) -> Tensor:
        h = self.before_attention(x)
        keys_and_values = self.k(h) + self.v(h)
        if self.repeats > 1:
            keys_and_values = keys_and_values.repeat_interleave(self.repeats, -1)
        x = x + self.o(self.q(h) + keys_and_values)
        h = self.before_mlp(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class SimplifiedStack(nn.Module):
    """Blocks one after the other."""

    def __init__(self, v: Variant):
        super().__init__()
        shapes = llama_shapes(v.d_model, v.d_ffn, 1, v.kv_width)
        block = {name.removeprefix("0."): shape for name, shape in shapes.items()}
        self.blocks = nn.ModuleList(Block(block, v.rank, v.d_model) for _ in range(v.layers))
        self.to_empty(device="cpu")
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        self.recompute = v.layerwise

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


class RealStack(nn.Module):
    """Transformers' Llama on input vectors."""

    def __init__(self, v: Variant):
        super().__init__()
        preset = dataclasses.replace(
            find_preset(PRESET),
            d_model=v.d_model,
            d_ffn=v.d_ffn,
            heads=v.heads,
            layers=v.layers,
            kv_heads=v.heads * v.kv_width // v.d_model,
        )
        model: Any = skeleton(hf_config(preset, vocab_size=1, context=max(v.tokens, 8)))
        factorize(model, "sct", rank=v.rank, rank_rule="code")
        allocate(model)
        for name, p in model.named_parameters():
            if "norm" in name:
                nn.init.ones_(p)
        self.model = model.model.requires_grad_(True)
        self.model.embed_tokens.requires_grad_(False)
        self.model.norm.requires_grad_(False)
        if v.layerwise:
            from nativerank.train.recompute import recompute_blocks

            recompute_blocks(model)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return out


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Random frames and s = 1, as in the paper's test. Blocks after the first have its frames with the rows shifted."""
    generator, first = torch.Generator().manual_seed(seed), dict[str, list[Tensor]]()
    for name, layer in factor_layers(model).items():
        block = int(next(part for part in name.split(".") if part.isdigit()))
        tall = [layer.up.weight, layer.down.weight.mT]
        if block == 0:
            first[name] = [retract(torch.randn(x.shape, generator=generator)) for x in tall]
        for x, frame in zip(tall, first[name.replace(f".{block}.", ".0.")], strict=True):
            x.copy_(frame.roll(997 * block, 0))
        layer.s.fill_(1.0)


class Session:
    """A stack with its optimizer; each step is timed by phases."""

    def __init__(self, variant: Variant, seed: int = 0):
        self.variant = variant
        self.model = RealStack(variant) if variant.attention == "real" else SimplifiedStack(variant)
        fill(self.model, seed)
        momentum = variant.state == "momentum-bf16"
        self.optimizer = build_optimizer(
            self.model,
            "stiefel-spectron" if momentum else "sct",
            lr=1e-3 if momentum else 1e-4,
            aux_lr=1e-4,
            s_lr=1e-4,
            betas=(0.9, 0.999),
            state_dtype="fp32" if variant.state == "fp32" else "bf16",
            layerwise=variant.layerwise,
        )
        generator = torch.Generator().manual_seed(seed + 1)
        self.inputs = torch.randn(1, variant.tokens, variant.d_model, generator=generator)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.last = time.perf_counter()
        if self.optimizer.layerwise is not None:
            self.optimizer.layerwise.watch(measure=False, refuse=False, mark=self.mark)

    def mark(self, phase: str) -> None:
        """The time since the last mark was spent on this."""
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now

    def forward_backward(self) -> float:
        """The loss; gradients are there afterwards, or used up already."""
        self.seconds, self.last = dict.fromkeys(PHASES, 0.0), time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(self.inputs).sum()
        self.mark("forward")
        loss.backward()
        self.mark("backward")
        return loss.item()

    def step(self) -> float:
        """One step of ours, whose loss is returned."""
        with marked(self.mark):  # what comes before a retraction belongs to the optimizer
            loss = self.forward_backward()
            self.optimizer.step()
            self.mark("optimizer")
        return loss


def frame_error(model: nn.Module) -> float:
    """The largest |Q^T Q - I| over all frames."""
    worst = 0.0
    for layer in factor_layers(model).values():
        for Q in (layer.up.weight, layer.down.weight.mT):
            G = Q.detach().double().mT @ Q.detach().double()
            worst = max(worst, (G - torch.eye(len(G), dtype=G.dtype)).abs().max().item())
    return worst


def measure(variant: Variant, steps: int = 2) -> dict[str, Any]:
    """Losses of some steps, phases of the last one, and the process's peak memory before and after: for a fresh one."""
    base = peak_memory_bytes(torch.device("cpu"))
    began = time.perf_counter()
    session = Session(variant)
    ready = time.perf_counter() - began
    losses = [session.step() for _ in range(steps)]
    peak = peak_memory_bytes(torch.device("cpu"))  # before frame_error, which is no part of a step
    factors = sum(p.numel() for layer in factor_layers(session.model).values() for p in layer.parameters())
    return {
        **dataclasses.asdict(variant),
        "method": "stiefel-spectron" if variant.state == "momentum-bf16" else "sct",
        "factor_parameters": factors,
        "losses": losses,
        "seconds": {**session.seconds, "step": sum(session.seconds.values())},
        "initialization_seconds": ready,
        "peak_rss_bytes": peak,
        "base_rss_bytes": base,
        "frame_error": frame_error(session.model),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Variant(**json.loads(sys.argv[1])))))
