"""What the timing benchmarks share: contestants take turns in one process, and medians of paired ratios are reported.

On a noisy machine nothing else means anything: absolute seconds of two runs differ by more than the contestants do.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from nativerank.train.step import Stopwatch

T = TypeVar("T")
Watch = Callable[[str, int, int], None]
WATCH: ContextVar[Watch] = ContextVar("WATCH", default=lambda what, done, total: None)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def check_sizes(**sizes: int | None) -> None:
    """Raises a ValueError naming the flag of a size below 1."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")


@contextmanager
def told(watch: Watch) -> Iterator[None]:
    """In the block `watch` hears of every round before it begins, which is when nothing is measured."""
    token = WATCH.set(watch)
    try:
        yield
    finally:
        WATCH.reset(token)


def rounds(contestants: Sequence[T], repeats: int, warmup: int) -> Iterator[tuple[list[T], bool]]:
    """(the contestants, in reverse order every other time, and whether this round counts)."""
    watch = WATCH.get()
    for turn in range(warmup + repeats):
        watch("rounds", turn, warmup + repeats)
        yield (list(contestants) if turn % 2 else list(reversed(contestants))), turn >= warmup


def race(
    calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device, in_a_row: int = 1
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, interleaved, after one that does not count.

    Args:
        in_a_row: calls of a turn, of which the mean counts; on CUDA only the last is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for names, counts in rounds(list(calls), repeats, warmup=1):
        for name in names:
            watch = Stopwatch(device, wait=True)
            for _ in range(in_a_row):
                calls[name]()
            watch.mark(name)
            if counts:
                seconds[name].append(watch.seconds[name] / in_a_row)
    return seconds


def with_threads(counts: Sequence[int] | None, device: torch.device) -> Iterator[int]:
    """Every number of threads, set while its turn lasts.

    Args:
        counts: None takes one and what PyTorch uses; on another device than a CPU only the latter.
    """
    before = torch.get_num_threads()
    try:
        for count in counts or sorted({1, before} if device.type == "cpu" else {before}):
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


def check_threads(counts: Sequence[int] | None) -> None:
    """Raises a ValueError for a number of threads below 1."""
    for count in counts or ():
        check_sizes(threads=count)


@contextmanager
def measured_by(clock: str, threads: Sequence[int], device: torch.device) -> Iterator[None]:
    """Times in the block are the wall clock's, or the processor's, which other work on the machine disturbs less.

    Args:
        clock: "wall" or "cpu". threads: that take part.

    Raises:
        ValueError: processor time of several threads, which would be added up, or of another device.
    """
    if clock not in CLOCKS:
        raise ValueError(f"--clock is one of {', '.join(CLOCKS)}, got {clock!r}")
    if clock == "cpu" and (device.type != "cpu" or max(threads) > 1):
        raise ValueError("--clock cpu adds up the time of all threads; use --device cpu and --threads 1")
    before, Stopwatch.clock = Stopwatch.clock, staticmethod(CLOCKS[clock])
    try:
        yield
    finally:
        Stopwatch.clock = staticmethod(before)


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of the same rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
