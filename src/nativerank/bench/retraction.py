"""What bringing factors back to orthonormal columns costs: each way against looped Householder QR with a sign fix.

The loop is what SCT's published code does: `torch.linalg.qr` and sign(diag R), one matrix after the other. Each way of
`linalg.retract` takes the same frames after a step of spectral norm about 0.1, as stacks (n, d, r) of equal shape:

| case | matrices |
|---|---|
| 70b | 11 of (8192, 32), 3 of (28672, 32) per layer: the SCT paper's LLaMA-3-70B shape at rank 32 |
| wide | 14 of (1024, 256), the factors of one layer of width 1024 |

Ratios are medians over rounds in which all contestants take turns; with more threads than idle cores LAPACK's many
small parallel regions wait for each other and the ratios flatter us, so they are also given for one thread.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nativerank.bench.measure import check_sizes, check_threads, measured_by, race, with_threads
from nativerank.bench.record import raced, record
from nativerank.linalg.retract import WAYS, retract
from nativerank.optim.stacks import STACK_BYTES, STACK_BYTES_CPU
from nativerank.train.setup import pick_device

RANK = 32
LAYER_70B = ((11, 8192, RANK), (3, 28672, RANK))
WIDE = ((14, 1024, 256),)
STEP = 0.1
LOOP = "loop"


def bench_retraction(
    layers: int = 2, repeats: int = 7, threads: list[int] | None = None, device: str = "cpu", clock: str = "wall"
) -> dict[str, Any]:
    """Both cases for each number of threads.

    Args:
        layers: of the 70B shape. repeats: recorded rounds, after one unrecorded.
        threads: numbers of threads to measure with; None takes one, and what PyTorch uses.
        device: cpu, cuda or mps. clock: "cpu" takes processor time, of one thread.
    """
    check_sizes(layers=layers, repeats=repeats)
    check_threads(threads)
    where = pick_device(device)
    settings = {"layers": layers, "repeats": repeats, "threads": threads, "clock": clock, "device": device}
    stacks = {"70b": [(layers * n, d, r) for n, d, r in LAYER_70B], "wide": list(WIDE)}
    with measured_by(clock, threads or [torch.get_num_threads()], where):
        cases = [
            measure({"stacks": name, "threads": count}, shapes, repeats, where)
            for count in with_threads(threads, where)
            for name, shapes in stacks.items()
        ]
    return record("retraction", settings, cases, where)


def measure(
    case: dict[str, Any], shapes: list[tuple[int, int, int]], repeats: int, device: torch.device
) -> dict[str, Any]:
    """A race on stacks (n, d, r) against the loop, and the largest |Q^T Q - I| of every contestant."""
    starts, moved = zip(*(step_of_frames(shape, device) for shape in shapes), strict=True)

    def stacks(way: str) -> list[Tensor]:
        return [retract(X, way, U) for X, U in zip(moved, starts, strict=True)]

    calls: dict[str, Callable[[], list[Tensor]]] = {LOOP: lambda: [looped(x) for X in moved for x in X]}
    calls |= {way: partial(stacks, way) for way in WAYS}
    seconds = race(calls, repeats, device)
    off = {name: max(map(off_orthonormal, call())) for name, call in calls.items()}
    return raced(case | {"shapes": [list(shape) for shape in shapes]}, LOOP, seconds, off_orthonormal=off)


def as_the_optimizer_does(shapes: Iterable[tuple[int, int, int]], device: torch.device) -> list[tuple[int, int, int]]:
    """The stacks that an optimizer makes of these, as large as `optim.stacks` lets them be."""
    limit, found = STACK_BYTES_CPU if device.type == "cpu" else STACK_BYTES, []
    for n, d, r in shapes:
        most = max(1, limit // (4 * d * r))
        found += [(min(most, n - done), d, r) for done in range(0, n, most)]
    return found


def step_of_frames(shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Random frames (n, d, r), and the same after a random step."""
    n, d, r = shape
    generator = torch.Generator().manual_seed(0)
    U = retract(torch.randn(n, d, r, generator=generator))
    D = torch.randn(n, d, r, generator=generator) * (STEP / (d**0.5 + r**0.5))
    return U.to(device), (U - D).to(device)


def looped(X: Tensor) -> Tensor:
    """One matrix, as published."""
    Q, R = torch.linalg.qr(X)
    return Q * torch.sign(torch.diagonal(R))


def off_orthonormal(Q: Tensor) -> float:
    """max |Q^T Q - I| over a stack, measured in float64."""
    Q = Q.cpu().double()
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max().item()
