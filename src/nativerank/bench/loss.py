"""Output head and cross entropy, forward and backward: all logits at once beside chunks of tokens.

    whole     F.linear, F.cross_entropy and autograd, as the loss of a model's logits is made
    N         `evaluate.head_loss` in chunks of N tokens

Both give the gradients of the head's input and of its weight. Float32 on a CPU, bfloat16 autocast on CUDA.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nativerank.bench.measure import check_sizes, check_threads, race, with_threads
from nativerank.bench.record import raced, record
from nativerank.evaluate.head_loss import chunk_tokens, chunked_mean_loss
from nativerank.evaluate.loss import autocast, token_losses_of
from nativerank.models import find_preset
from nativerank.train.setup import pick_device

WHOLE = "whole"


def bench_loss(
    presets: Sequence[str] = ("demo", "spectron-s"),
    tokens: int = 2048,
    chunks: Sequence[int] = (64, 256, 1024),
    repeats: int = 7,
    threads: list[int] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Times the loss by turns.

    Args:
        presets: width and vocabulary, a case each. tokens: of a pass.
        chunks: tokens of a chunk; what the rule takes is added.
        repeats: recorded passes of each, after one unrecorded.
        threads: numbers of threads to measure with; None takes one, and what PyTorch uses.
        device: cpu, cuda or mps.
    """
    check_sizes(tokens=tokens, repeats=repeats, chunks=min(chunks))
    check_threads(threads)
    where, shapes = pick_device(device), {name: find_preset(name) for name in presets}
    sizes = sorted({*chunks, chunk_tokens(tokens, where)})
    cases = []
    for count in with_threads(threads, where):
        for name, preset in shapes.items():
            case = {"preset": name, "d_model": preset.d_model, "vocab_size": preset.vocab_size, "threads": count}
            seconds = _race(tokens, preset.d_model, preset.vocab_size, sizes, repeats, where)
            cases.append(raced(case, WHOLE, seconds, rule=chunk_tokens(tokens, where)))
    settings = {"presets": list(presets), "tokens": tokens, "chunks": list(chunks), "repeats": repeats}
    settings |= {"threads": threads, "device": device}
    return record("loss", settings, cases, where)


def _race(
    tokens: int, d_model: int, vocab_size: int, sizes: Sequence[int], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    torch.manual_seed(0)
    head = nn.Linear(d_model, vocab_size, bias=False).to(device)
    x = torch.randn(tokens, d_model, device=device, requires_grad=True)
    targets = torch.randint(vocab_size, (tokens,), device=device)

    def timed(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            x.grad = head.weight.grad = None
            with autocast(device):
                found = loss()
            found.backward()

        return call

    calls = {WHOLE: timed(lambda: token_losses_of(F.linear(x, head.weight)[None], targets[None]).mean())}
    for size in sizes:
        calls[str(size)] = timed(functools.partial(chunked_mean_loss, x, head.weight, None, targets, size))
    return race(calls, repeats, device)
