"""What Spectron's algebra costs: against plain Newton-Schulz, as a share of a layer's work, and in counted FLOPs.

| part | what is timed |
|---|---|
| orthogonalize | one (d, r) matrix in r x r, as the optimizer does it and by products alone, and the plain form |
| layer | the optimizer on one decoder layer, and as published, as shares of that layer's forward and backward pass |
| step | a step over all factors of a preset, against Muon on one factor after the other |
| flops | nothing: formulas for the preset's shapes, and the tokens per step above which they are below 1% |

Everything takes turns in one process. Times hold for this machine and its threads; the FLOPs hold anywhere.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.accounting.algebra import algebra_flops
from nativerank.bench.measure import check_sizes, check_threads, measured_by, race, with_threads
from nativerank.bench.plain import OneAtATime, PlainSpectron, plain_newton_schulz
from nativerank.bench.record import raced, record
from nativerank.evaluate.loss import autocast
from nativerank.layers.base import factor_layers
from nativerank.linalg.gram import gram
from nativerank.linalg.norms import power_iteration
from nativerank.linalg.orthogonalize import (
    coefficients,
    factor_by_products,
    orthogonalize,
)
from nativerank.methods import factorize
from nativerank.models import DENSE, Preset, find_preset, hf_config, materialize, scaled, skeleton
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.parallel import at_once, run_all
from nativerank.train.setup import pick_device

FORMS: dict[str, dict[str, Any]] = {"spectron": {}, "certified": {"certified": True}, "exact": {"norm": "exact"}}
CONTEXT = 2048


def bench_optimizer(
    preset_name: str = "spectron-s",
    d_model: int = 1024,
    layers: int | None = None,
    tokens_per_step: int = 8192,
    repeats: int = 5,
    threads: list[int] | None = None,
    device: str = "cpu",
    clock: str = "wall",
) -> dict[str, Any]:
    """Runs all parts.

    Args:
        preset_name: whose factors `step` and `flops` are about. layers: another depth for it.
        d_model: width of `layer` (rank a quarter); `orthogonalize` takes (d, d / 4) at this width and at twice it.
        tokens_per_step: tokens that go through `layer`.
        repeats: recorded calls of everything, after one unrecorded.
        threads: numbers of threads to measure with; None takes one, and what PyTorch uses.
        device: cpu, cuda or mps. clock: "cpu" takes processor time, of one thread.
    """
    check_sizes(d_model=d_model, layers=layers, tokens_per_step=tokens_per_step, repeats=repeats)
    check_threads(threads)
    if d_model % 64:
        raise ValueError(f"--d_model must be a multiple of 64, the head size, got {d_model}")
    where = pick_device(device)
    preset = scaled(find_preset(preset_name.removesuffix(DENSE)), None, layers)
    one_layer = layer_preset(d_model)
    tall = [(d_model, d_model // 4), (2 * d_model, d_model // 2)]
    cases = []
    with measured_by(clock, threads or [torch.get_num_threads()], where):
        for count in with_threads(threads, where):
            found = [time_orthogonalize(d, r, repeats, where) for d, r in tall]
            found += [time_layer(one_layer, tokens_per_step, repeats, where), time_step(preset, repeats, where)]
            cases += [{**one, "case": one["case"] | {"threads": count}} for one in found]
    settings = {"preset": preset_name, "layers": preset.layers, "d_model": d_model, "tokens_per_step": tokens_per_step}
    settings |= {"repeats": repeats, "threads": threads, "clock": clock, "device": device}
    return {
        **record("optimizer", settings, cases, where),
        "flops": {
            "layer": algebra_flops(low_rank_skeleton(one_layer), CONTEXT),
            "preset": algebra_flops(low_rank_skeleton(preset), preset.context),
        },
    }


def layer_preset(d_model: int) -> Preset:
    """One LLaMA layer as in Spectron's models (FFN 8 d / 3, up to a multiple of 256), all ranks a quarter of d."""
    d_ffn = -(-8 * d_model // 3 // 256) * 256
    return Preset("", d_model, 1, d_model // 64, d_ffn, 64, CONTEXT, 1, 1, value=d_model // 4)


def low_rank_skeleton(preset: Preset) -> nn.Module:
    """Its factorized model on the meta device."""
    model = skeleton(hf_config(preset))
    factorize(model, "spectron", rank_ratio=preset.ratio, rank=preset.value)
    return model


def time_orthogonalize(d: int, r: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """A Gaussian (d, r) matrix, five Newton-Schulz steps; `gram` is what the optimizer runs here."""
    M = torch.randn(1, d, r, generator=torch.Generator().manual_seed(0)).to(device)

    def by_products() -> Tensor:
        G = gram(M)
        trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        return M @ (factor_by_products(G / trace, coefficients("newton-schulz", 5)) * trace.rsqrt())

    calls = {"plain": lambda: plain_newton_schulz(M), "gram": lambda: orthogonalize(M), "gram_products": by_products}
    seconds = race(calls, repeats, device)
    plain = calls["plain"]()
    difference = ((calls["gram"]() - plain).norm() / plain.norm()).item()
    return raced({"part": "orthogonalize", "shape": [d, r]}, "plain", seconds, relative_difference=difference)


def time_layer(preset: Preset, tokens: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Steps of every form over one layer's factors, and orthogonalization + norms alone, beside forward + backward."""
    model: Any = materialize(low_rank_skeleton(preset), seed=0, init_scale=3**-0.5, init="sampled").to(device).train()
    sequences = max(1, tokens // CONTEXT)
    X, Y = torch.randn(2, sequences, tokens // sequences, preset.d_model, device=device)
    X.requires_grad_()

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(device):
            out = model.model(inputs_embeds=X).last_hidden_state
        out.backward(Y.to(out.dtype))

    forward_backward()  # gradients for the optimizers' first turn
    pairs = [(layer.up.weight, layer.down.weight) for layer in factor_layers(model).values()]
    factors = [p for pair in pairs for p in pair]
    steps: dict[str, Callable[[], Any]] = {
        name: LowRankOptimizer([{"params": factors, "rule": "spectron", "lr": 1e-3, **options}]).step
        for name, options in FORMS.items()
    }
    steps["plain"] = PlainSpectron(pairs, lr=1e-3).step
    algebra = partial(orthogonalize_and_norms, factors)
    seconds = race({"forward_backward": forward_backward, "algebra": algebra, **steps}, repeats, device)
    case = {"part": "layer", "d_model": preset.d_model, "d_ffn": preset.d_ffn, "rank": preset.value}
    return raced(case | {"tokens_per_step": X.shape[0] * X.shape[1]}, "forward_backward", seconds)


@torch.no_grad()
def orthogonalize_and_norms(factors: Sequence[Tensor]) -> None:
    """Five Newton-Schulz steps and one power iteration for every factor, without momentum and update."""

    def one(p: Tensor) -> None:
        assert p.grad is not None
        tall = p.shape[-2] >= p.shape[-1]
        X, M = (t if tall else t.mT for t in (p[None], p.grad[None]))
        orthogonalize(M)
        power_iteration(X, X[..., 0])

    run_all([partial(one, p) for p in factors], at_once(factors))


def time_step(preset: Preset, repeats: int, device: torch.device) -> dict[str, Any]:
    """Spectron on all factors of a preset with random gradients, and Muon on one of them after the other."""
    shapes = [
        p.shape
        for layer in factor_layers(low_rank_skeleton(preset)).values()
        for p in (layer.up.weight, layer.down.weight)
    ]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def contestant(build: Callable[[list[nn.Parameter]], Any]) -> Callable[[], Any]:
        parameters = [nn.Parameter(torch.randn(s, generator=generator).to(device) * s[-1] ** -0.5) for s in shapes]
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        return build(parameters).step

    calls = {
        "one_at_a_time": contestant(lambda params: OneAtATime(params, lr=1e-3)),
        "spectron": contestant(lambda params: LowRankOptimizer([{"params": params, "rule": "spectron", "lr": 1e-3}])),
    }
    seconds = race(calls, repeats, device)
    case = {"part": "step", "factors": len(shapes), "parameters": sum(s.numel() for s in shapes)}
    return raced(case, "one_at_a_time", seconds)
