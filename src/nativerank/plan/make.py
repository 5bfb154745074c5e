"""The whole plan of a configuration, beside that of its dense twin, as one record for JSON and for the table."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from nativerank.accounting.hardware import THIS_CPU, Device, find_device, present_device, read_devices, split_count
from nativerank.config import RunConfig
from nativerank.layers import FactorizeReport, rank_from_ratio
from nativerank.plan.advice import verdict, what_to_change
from nativerank.plan.check import check, check_here
from nativerank.plan.figures import MORE, Figures, figures
from nativerank.plan.memory import LEFT_OUT, bytes_of, largest_batch, parabola
from nativerank.plan.passes import resident
from nativerank.plan.roofline import run_time, step_time
from nativerank.plan.subject import Subject, dense_twin, subject

CONVENTIONS = {
    "exact": "2 per multiply-add, rank-aware, attention (full) and head included, recomputation not; MFU uses it",
    "6nd": "6 x parameters without embedding and head x tokens",
}


@dataclass(frozen=True)
class Request:
    """What is asked besides the configuration of a run.

    Attributes:
        on: DEVICE or DEVICExN; None is this machine's GPU, or its CPU.
        table: YAML file with more devices.
        price: of a device hour, in any currency.
        efficiency: share of the roofline that is reckoned with.
        check: make two real steps, too.
        search: look for the largest rank that fits, too.
    """

    on: str | None = None
    table: str | None = None
    price: float | None = None
    efficiency: float = 1.0
    check: bool = False
    search: bool = True


def make_plan(config: RunConfig, request: Request) -> dict[str, Any]:
    """Parameters, FLOPs, bytes and time of a run that is not made.

    Raises:
        ValueError: an unknown device, a number out of range, or a configuration that a run would refuse.
    """
    device, count = chosen_device(request)
    config = replace(config, device=config.device or ("cpu" if device.on_cpu else "cuda"))
    planned = subject(config, count)
    if request.check:
        check_here(planned)
    if request.on is None and device.on_cpu:
        device = shared(device, planned.processes.world)
    plan, found = side(planned, device, request)
    report = planned.build(MORE if planned.equal_blocks() else None)[1]
    twin = dense_twin(config)
    if twin is not None:
        other = subject(twin, count)
        plan["dense"] = side(other, device, request, (other.sequences,))[0]
    plan["fits"] = plan["bytes"]["peak"] <= device.memory_bytes
    plan["largest"] = largest(planned, found, report, device, request.search)
    plan["change"] = what_to_change(planned, plan["bytes"], device.memory_bytes)
    plan |= verdict(planned, report, plan, device)
    if request.check:
        plan["check"] = check(planned, plan)
    return {**described(planned, device), **plan, "conventions": CONVENTIONS, "left_out": LEFT_OUT}


def chosen_device(request: Request) -> tuple[Device, int | None]:
    """The device, with the user's price, and how many were named."""
    for name, value in (("price", request.price), ("efficiency", request.efficiency)):
        if value is not None and not 0 < value:
            raise ValueError(f"--{name} must be positive, got {value}")
    if request.efficiency > 1:
        raise ValueError(f"--efficiency is a share of the roofline, at most 1, got {request.efficiency}")
    devices = read_devices(request.table) if request.table else None
    if request.on is None:
        device, count = present_device() or find_device(THIS_CPU), None
    else:
        whole = (devices or {}).get(request.on)  # a name of one's own may end like a count
        name, number = (request.on, 1) if whole else split_count(request.on)
        device, count = find_device(name, devices) if devices else find_device(name), number if number > 1 else None
    return (device if request.price is None else replace(device, price_per_hour=request.price)), count


def shared(device: Device, processes: int) -> Device:
    """The part of this machine's CPU that each of several processes on it has."""
    if processes == 1:
        return device
    return replace(
        device,
        memory_bytes=device.memory_bytes // processes,
        bf16_flops=device.bf16_flops / processes,
        fp32_flops=device.fp32_flops / processes,
        bytes_per_second=device.bytes_per_second / processes,
        source=f"{device.source}; one machine, divided by its {processes} processes",
        price_per_hour=None if device.price_per_hour is None else device.price_per_hour / processes,
    )


def side(
    planned: Subject, device: Device, request: Request, sequences: tuple[int, ...] | None = None
) -> tuple[dict[str, Any], Figures]:
    """What one model costs, low rank or dense; `sequences` of a pass that are looked at, as in `figures`."""
    found = figures(planned, sequences)
    time = step_time(
        found.ops(planned.sequences),
        device,
        passes=planned.passes,
        tokens_per_step=planned.tokens_per_step,
        exact_flops=found.flops["per_token"]["exact"],
        world=planned.processes.world,
        efficiency=request.efficiency,
    )
    time |= run_time(time["seconds_per_step"], planned.steps, planned.processes.world, device.price_per_hour)
    return {
        "method": planned.config.method,
        "params": found.params,
        "flops": {
            **found.flops,
            "optimizer_over_exact": found.flops["optimizer_per_step"] / found.flops["per_step"]["exact"],
        },
        "bytes": bytes_of(planned, found),
        "sent_bytes": found.sent,
        "time": time,
    }, found


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

    Bytes go about as the numbers in the factors do, whose count is known for every ratio: so two plans lead to where it
    must be, and what is found is planned.
    """

    def numbers(ratio: float) -> int:
        ranks = ((e, rank_from_ratio(ratio, e.d_in, e.d_out, planned.config.rank.rule)) for e in report.entries)
        return sum(e.stack * rank * (e.d_in + e.d_out) for e, rank in ranks)

    now = planned.config.rank.ratio
    assert now is not None
    end = 1.0 if peak <= memory else 0.01
    at_end = peak_at_ratio(planned, end)
    if (at_end <= memory) == (end == 1.0):
        return end if end == 1.0 else 0.0
    slope = (at_end - peak) / (numbers(end) - numbers(now)) if numbers(end) != numbers(now) else 0.0
    guess = 100
    while guess > 1 and peak + slope * (numbers(guess / 100) - numbers(now)) > memory:
        guess -= 1
    while guess > 1 and peak_at_ratio(planned, guess / 100) > memory:
        guess -= 1
    return guess / 100


def peak_at_ratio(planned: Subject, ratio: float) -> int:
    """The peak of a plan at this ratio."""
    config = replace(planned.config, rank=replace(planned.config.rank, ratio=ratio))
    return peak_of(replace(planned, config=config))


def peak_of(planned: Subject) -> int:
    """The peak of a plan, looked at with the sequences that its passes have."""
    return bytes_of(planned, figures(planned, (planned.sequences,)))["peak"]


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


def described(planned: Subject, device: Device) -> dict[str, Any]:
    """What was planned, and for what."""
    c, shape = planned.config, planned.processes
    return {
        "model": c.init or c.model.config or c.model.preset,
        "settings": {
            "device": c.device,
            "replicas": shape.replicas,
            "shards": shape.shards,
            "sequences_per_pass": planned.sequences,
            "passes": planned.passes,
            "context": planned.context,
            "tokens_per_step": planned.tokens_per_step,
            "steps": planned.steps,
            "tokens": planned.tokens_per_step * planned.steps,
            "vocabulary": planned.vocab_size,
            "recompute": c.train.recompute,
            "loss": c.train.loss,
        },
        "device": {k: v for k, v in asdict(device).items() if k != "reported"},
    }
