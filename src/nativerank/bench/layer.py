"""Forward and backward pass of one factor layer beside the dense layer of its shape.

    FLOP share = 2 r (d_in + d_out) / (2 d_in d_out)      of the layer's declared matmuls, the same forward and backward
    over FLOPs = time ratio / FLOP share                  1: every FLOP of the factors is as fast as a dense one

The input needs a gradient, as inside a network: backward is two products for each of forward. Float32 on a CPU,
bfloat16 autocast over float32 weights on CUDA, as in training. There a turn is IN_A_ROW passes, so that the host
launches one while another runs; a pass of few tokens is still as long as its launches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.bench.measure import check_sizes, check_threads, measured_by, race, with_threads
from nativerank.bench.record import raced, record
from nativerank.evaluate.loss import autocast
from nativerank.layers import LowRankLinear, SpectralLinear
from nativerank.train.setup import pick_device

DENSE = "dense"
IN_A_ROW = 20  # on CUDA


def bench_layer(
    d_in: int = 4096,
    d_out: int = 11008,
    rank: int = 1024,
    tokens: int = 2048,
    repeats: int = 9,
    threads: list[int] | None = None,
    clock: str = "wall",
    device: str = "cpu",
) -> dict[str, Any]:
    """Times nn.Linear, A B^T and U diag(s) V^T by turns.

    Args:
        d_in, d_out: shape of the map. rank: of the factors. tokens: that go through it.
        repeats: recorded passes of each, after one unrecorded.
        threads: numbers of threads to measure with; None takes one, and what PyTorch uses.
        clock: "cpu" takes processor time, of one thread.
        device: cpu, cuda or mps.
    """
    settings: dict[str, Any] = dict(d_in=d_in, d_out=d_out, rank=rank, tokens=tokens, repeats=repeats)
    check_sizes(**settings)
    check_threads(threads)
    if rank > min(d_in, d_out):
        raise ValueError(f"--rank is at most the smaller side, {min(d_in, d_out)}, got {rank}")
    where = pick_device(device)
    case = {"d_in": d_in, "d_out": d_out, "rank": rank, "tokens": tokens, "dtype": dtype_name(where)}
    cases = []
    with measured_by(clock, threads or [torch.get_num_threads()], where):
        for count in with_threads(threads, where):
            found = time_layers(d_in, d_out, rank, tokens, repeats, where)
            cases.append({**found, "case": case | {"threads": count}})
    return record("layer", settings | {"threads": threads, "clock": clock, "device": device}, cases, where)


def dtype_name(device: torch.device) -> str:
    """What products are made in."""
    return "bfloat16" if device.type == "cuda" else "float32"


def time_layers(d_in: int, d_out: int, rank: int, tokens: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """One race; figures by contestant."""
    torch.manual_seed(0)
    layers: dict[str, Any] = {
        DENSE: nn.Linear(d_in, d_out, bias=False),
        "lowrank": LowRankLinear(d_in, d_out, rank),
        "spectral": SpectralLinear(d_in, d_out, rank),
    }
    for layer in layers.values():
        for p in layer.parameters():
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    x = torch.randn(tokens, d_in, device=device, requires_grad=True)
    upstream = torch.randn(tokens, d_out, device=device, dtype=getattr(torch, dtype_name(device)))
    calls = {name: passes(layer.to(device), x, upstream) for name, layer in layers.items()}
    flops = {name: declared(layer) for name, layer in layers.items()}
    found = raced({}, DENSE, race(calls, repeats, device, IN_A_ROW if device.type == "cuda" else 1))
    share = {name: value / flops[DENSE] for name, value in flops.items()}
    over = {name: found["ratio"][name] / share[name] for name in share}
    return {**found, "flop_share": share, "over_flops": over}


def declared(layer: Any) -> float:
    """FLOPs of a forward pass per token."""
    return float(sum(gemm.flops for gemm in layer.gemms()) if hasattr(layer, "gemms") else 2 * layer.weight.numel())


def passes(layer: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Forward and backward, gradients made anew."""
    leaves: Sequence[Tensor] = [x, *layer.parameters()]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        with autocast(x.device):
            y = layer(x)
        y.backward(upstream)

    return run
