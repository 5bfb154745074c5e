"""The whole plan of a configuration, beside that of its dense twin, as one record for JSON and for the table."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from nativerank.accounting.hardware import THIS_CPU, Device, find_device, present_device, read_devices, split_count
from nativerank.config import RunConfig
from nativerank.plan.advice import verdict, what_to_change
from nativerank.plan.check import check, check_here
from nativerank.plan.figures import Figures, depths, figures
from nativerank.plan.memory import LEFT_OUT, bytes_of
from nativerank.plan.passes import full_chunks
from nativerank.plan.roofline import run_time, step_time
from nativerank.plan.search import largest
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


def make_plan(config: RunConfig, request: Request, watch: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Parameters, FLOPs, bytes and time of a run that is not made.

    Args:
        watch: told what is going on.

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
    watch("a step, traced")
    plan, found = side(planned, device, request, full_chunks(planned))
    report = planned.build(depths(planned)[-1])[1]
    twin = dense_twin(config)
    if twin is not None:
        watch("a step of the dense twin, traced")
        plan["dense"] = side(subject(twin, count), device, request)[0]
    plan["fits"] = plan["bytes"]["peak"] <= device.memory_bytes
    watch("the largest that fits" if request.search else "what to change")
    plan["largest"] = largest(planned, found, report, device, request.search)
    plan["change"] = what_to_change(planned, plan["bytes"], device.memory_bytes)
    plan |= verdict(planned, report, plan, device)
    if request.check:
        watch("two real steps")
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
    planned: Subject, device: Device, request: Request, also: tuple[int, ...] = ()
) -> tuple[dict[str, Any], Figures]:
    """What one model costs, low rank or dense; passes of `also` sequences are traced, too."""
    found = figures(planned, sorted({planned.sequences, *also}))
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
