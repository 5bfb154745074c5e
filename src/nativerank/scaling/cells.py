"""From a design to the runs that it consists of: parameters, steps, tokens, rates, FLOPs, and time on a device.

    steps = round(C / (FLOPs per token * tokens per step)),   each run with a schedule of its own length

Models are counted on the meta device and no data are read, so a sweep up to billions of parameters is planned in
seconds. Time is that of `nativerank plan`: a bound by the device's peaks.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nativerank.accounting.flops import flops_per_token, guided_share
from nativerank.experiments.arms import LR, Arm, Value, configured
from nativerank.experiments.contender import without_guides
from nativerank.experiments.grid import Cell
from nativerank.methods import find_method
from nativerank.models import count_parameters, family, find_preset
from nativerank.plan.make import Request, chosen_device, side
from nativerank.plan.subject import Subject, subject
from nativerank.scaling.design import Design

RATIO = "rank.ratio"


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        cell: as the grid runs it.
        size, method: as they were named.
        rank_ratio: r / d_in; None where matrices are dense or ranks follow another rule.
        budget: FLOPs that were asked for.
        lr, seed, steps, tokens: of the run.
        params: "total" and "non_embedding".
        flops: of the run by both conventions, "6nd" with the N of the sweep, and "exact".
        source: settings (JSON) without steps and seed.
    """

    cell: Cell
    size: str
    method: str
    rank_ratio: float | None
    budget: float
    lr: float
    seed: int
    steps: int
    tokens: int
    params: dict[str, int]
    flops: dict[str, float]
    source: str

    def row(self) -> dict[str, Any]:
        """What a sweep's records say of it."""
        kept = ("size", "method", "rank_ratio", "budget", "lr", "seed", "steps", "tokens", "params", "flops")
        return {"cell": self.cell.name} | {name: getattr(self, name) for name in kept}


def plan_cells(design: Design) -> list[Planned]:
    """The runs of a design, by arm, budget and size.

    Raises:
        ValueError: what `nativerank train` would refuse, or a budget that is too small for a step of a model.
    """
    found = [
        run
        for arm in design.arms
        for budget in design.budgets
        for size in design.sizes
        for run in runs_of(design, arm, size, budget)
    ]
    if not found:
        low, high = design.tokens_per_param
        raise ValueError(f"no cell of the sweep has {low:g} to {high:g} tokens per parameter (--tokens_per_param)")
    return found


def runs_of(design: Design, arm: Arm, size: str, budget: float) -> Iterator[Planned]:
    """The runs of one model at one budget: its rates and seeds; none if its tokens per parameter are out of range."""
    settings = {**design.common, **arm.settings, "method": arm.method, **where(size)}
    source = json.dumps(settings, sort_keys=True)
    try:
        known = counted(source)
    except ValueError as error:
        raise ValueError(f"{arm.label} at {size}: {error}") from None
    params = known["params"][design.count]
    if design.params_unit:
        params = round(params / design.params_unit) * design.params_unit
    per_token = {"6nd": 6.0 * params, "exact": known["exact"]}
    per_step = per_token[design.convention] * known["tokens_per_step"]
    steps = round(budget / per_step)
    if steps < 1:
        raise ValueError(
            f"a budget of {budget:.3g} FLOPs is less than one step of {arm.label} at {size}, {per_step:.3g}"
        )
    tokens = steps * known["tokens_per_step"]
    low, high = design.tokens_per_param
    if not low <= tokens / params <= high:
        return
    flops = {name: value * tokens for name, value in per_token.items()}
    for value in design.lrs:
        lr = rate(design, value, known, size)
        for seed in range(design.seeds):
            own = {LR: lr, "train.steps": steps, "train.seed": seed}
            cell = Cell(tuple(sorted({**settings, **own}.items())))
            yield Planned(
                cell, size, arm.method, known["ratio"], budget, lr, seed, steps, tokens, known["params"], flops, source
            )


def where(size: str) -> dict[str, str]:
    """The setting that names a size."""
    is_file = size.endswith(".json") or Path(size).is_dir()
    return {"model.config": size} if is_file else {"model.preset": size}


def rate(design: Design, value: Value, known: dict[str, Any], size: str) -> float:
    """The matrix rate of a run; three digits."""
    if not value.relative:
        return value.number
    rule = 1.0
    if design.lr_exponent:
        if "model.config" in where(size):
            raise ValueError(f"--lr_exponent needs presets, whose rates belong to a width; {size} is none")
        rule = (known["width"] / find_preset(family(size)).d_model) ** design.lr_exponent
    return (
        value.at(known["lr"] * rule) if value.number * rule == 1 else float(f"{known['lr'] * rule * value.number:.3g}")
    )


@functools.cache
def subject_of(source: str) -> Subject:
    """The resolved configuration of settings (JSON)."""
    return subject(configured(json.loads(source)))


@functools.cache
def counted(source: str) -> dict[str, Any]:
    """What the settings (JSON) of a run lead to, whatever its length.

    Raises:
        ValueError: what `nativerank train` would refuse.
    """
    planned = subject_of(source)
    config = planned.config
    model, _ = planned.build()
    guided = guided_share(config.guide.share, config.guide.stochastic)
    low_rank = find_method(config.method or "").layer is not None
    return {
        "params": count_parameters(without_guides(model)),
        "exact": flops_per_token(model, planned.context, guided).training,
        "tokens_per_step": planned.tokens_per_step,
        "ratio": config.rank.ratio if low_rank and config.rank.value is None else None,
        "lr": config.optim.lr,
        "width": planned.width(),
    }


def seconds_on(cells: list[Planned], request: Request) -> list[float]:
    """The time that each run would take on a device, at least.

    Args:
        cells: of a plan. request: names the device; see `plan.make`.
    """
    device, count = chosen_device(request)
    per_step: dict[str, float] = {}
    for planned in cells:
        if planned.source not in per_step:
            what = subject(
                configured({**json.loads(planned.source), "device": "cpu" if device.on_cpu else "cuda"}), count
            )
            per_step[planned.source] = side(what, device, request)[0]["time"]["seconds_per_step"]
    return [planned.steps * per_step[planned.source] for planned in cells]
