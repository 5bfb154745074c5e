"""The most that fits one process: sequences of a pass, the batch of a run, the rank."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nativerank.accounting.hardware import Device
from nativerank.layers import FactorizeReport, rank_from_ratio
from nativerank.plan.figures import Figures, figures
from nativerank.plan.memory import bytes_of
from nativerank.plan.passes import full_chunks, resident
from nativerank.plan.subject import Subject


def largest(
    planned: Subject, found: Figures, report: FactorizeReport | None, device: Device, search: bool
) -> dict[str, Any]:
    """What fits one process at most.

    Returns:
        `sequences` of a pass; `batch_size` and `accumulation`, the most that a run of as many sequences per step takes,
        0 and None if there is none; at the planned batch the largest `rank` for the key `rank_key`, up to `rank_limit`.
    """
    memory = device.memory_bytes
    sizes: dict[str, Any] = {"sequences": largest_batch(planned, found, memory)}
    sizes |= batch_of(planned, sizes["sequences"], memory)
    if not search or report is None or planned.equal_blocks() is None:
        return sizes
    if planned.config.rank.ratio is not None:
        ratio = largest_ratio(planned, report, bytes_of(planned, found)["peak"], memory)
        return sizes | {"rank_key": "rank.ratio", "rank": ratio, "rank_limit": 1.0}
    most = min(min(entry.d_in, entry.d_out) for entry in report.entries)
    return sizes | {"rank_key": "rank.value", "rank": largest_rank(planned, most, memory), "rank_limit": most}


def largest_batch(planned: Subject, found: Figures, memory: int) -> int:
    """The most sequences of a pass of one process that fit; 0 if not even one does.

    Where they do not fill chunks of the loss a pass takes up to 1% more or less than this reckons with.

    Args:
        found: with passes of `full_chunks`, from which more sequences are reckoned; fewer are looked at themselves.
    """
    least = full_chunks(planned)[0]

    def fits(n: int) -> bool:
        other = replace(planned, sequences=n)
        return (peak_of(other) if n < least else bytes_of(other, found)["peak"]) <= memory

    low, high = (least, 2 * least) if fits(least) else (0, least)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def batch_of(planned: Subject, sequences: int, memory: int) -> dict[str, Any]:
    """The largest train.batch_size, with its accumulation, that shares the sequences of a step evenly and fits."""
    train = planned.config.train
    assert train.batch_size and train.accumulation
    total = train.batch_size * train.accumulation
    own = total // planned.processes.world
    for size in range(min(own, sequences), 0, -1):
        if own % size or (planned.config.optim.layerwise and size < own):
            continue
        other = replace(planned, sequences=size, passes=own // size)
        if resident(other) == resident(planned) or peak_of(other) <= memory:  # else other gradients are there
            return {"batch_size": size, "accumulation": total // size}
    return {"batch_size": 0, "accumulation": None}


def largest_ratio(planned: Subject, report: FactorizeReport, peak: int, memory: int) -> float:
    """The largest rank.ratio that fits, in hundredths up to full rank; 0 if not even the least does.

    Bytes go about as the numbers in the factors do, whose count is known for every ratio: so a line between a plan that
    fits and one that does not leads close to the answer. Every guess is planned; one that was bad is followed by the
    middle of what is left.
    """

    def numbers(ratio: float) -> int:
        ranks = ((e, rank_from_ratio(ratio, e.d_in, e.d_out, planned.config.rank.rule)) for e in report.entries)
        return sum(e.stack * rank * (e.d_in + e.d_out) for e, rank in ranks)

    now = planned.config.rank.ratio
    assert now is not None
    fits = peak <= memory
    points = {fits: (numbers(now), peak)}  # the largest that fits and the smallest that does not, with their bytes
    low, high = 0, 101  # hundredths that fit, and that do not
    guess = 100 if fits else 1
    while high - low > 1:
        found, left = peak_at_ratio(planned, guess / 100), high - low
        points[found <= memory] = numbers(guess / 100), found
        low, high = (guess, high) if found <= memory else (low, guess)
        guess = (low + high) // 2
        if len(points) == 2 and (high - low <= left / 2 or left == 101):
            (a, at_a), (b, at_b) = points[True], points[False]
            wanted = a + (memory - at_a) * (b - a) / (at_b - at_a)
            guess = max((h for h in range(low + 1, high) if numbers(h / 100) <= wanted), default=low + 1)
    return low / 100


def peak_at_ratio(planned: Subject, ratio: float) -> int:
    """The peak of a plan at this ratio."""
    config = replace(planned.config, rank=replace(planned.config.rank, ratio=ratio))
    return peak_of(replace(planned, config=config))


def peak_of(planned: Subject) -> int:
    """The peak of a plan, looked at by itself."""
    return bytes_of(planned, figures(planned))["peak"]


def largest_rank(planned: Subject, most: int, memory: int) -> int:
    """The largest single rank of all matrices that fits, up to that of the smallest matrix; 0 if not even 1 does.

    What a run takes is a polynomial of the rank, of second degree where r x r matrices are kept.
    """
    points = {most: rank_bytes(planned, most)}
    if points[most] <= memory:
        return most
    for rank in sorted({1, max(2, most // 2)} - {most}):
        points[rank] = rank_bytes(planned, rank)
        if rank == 1 and points[rank] > memory:
            return 0
    peak = parabola(points)
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= memory else (low, middle)
    return low


def rank_bytes(planned: Subject, rank: int) -> int:
    """The peak of a plan at this one rank."""
    r = replace(planned.config.rank, ratio=None, energy=None, value=rank)
    return peak_of(replace(planned, config=replace(planned.config, rank=r)))


def parabola(points: Mapping[int, float]) -> Any:
    """The polynomial through three points."""

    def value(x: int) -> float:
        total = 0.0
        for a, y in points.items():
            for b in points:
                y *= (x - b) / (a - b) if a != b else 1.0
            total += y
        return total

    return value
