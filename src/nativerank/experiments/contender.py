"""An arm with everything that follows from its configuration: where it starts, how long it runs, what that costs.

Model and optimizer are built on the meta device, so a 70B is known in seconds (with --init its weights are read once),
and what `nativerank train` would refuse is refused before anything runs.
"""

import copy
import functools
import json
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nativerank.accounting.flops import flops_per_token, guided_share
from nativerank.config import RunConfig
from nativerank.evaluate.probes import probed_names
from nativerank.experiments.arms import AUX_LR, COORDINATES, LR, Arm, configured
from nativerank.experiments.grid import Cell
from nativerank.layers import guided_layers
from nativerank.methods import find_method
from nativerank.models import count_parameters
from nativerank.train.resolve import resolve, tokens_per_step
from nativerank.train.setup import check_fit, initial_model, new_skeleton, open_data, optimizer_for, pick_device

Point = dict[str, float]  # coordinate -> value


@dataclass(frozen=True)
class Contender:
    """An arm with everything that follows from its configuration.

    Args:
        arm: as it was entered.
        settings: of its cells, without coordinates, steps and seed.
        source: all settings as they were given, JSON.
        start: its coordinates where nobody moves them.
        steps, tokens_per_step: length of its runs.
        flops_per_token: of training, averaged over the run.
        parameters: total and non_embedding; a guide, which is gone at the end, left out.
        rank: as it was set, for tables; "" for dense matrices.
        device: that it runs on.
    """

    arm: Arm
    settings: dict[str, Any]
    source: str
    start: Point
    steps: int
    tokens_per_step: int
    flops_per_token: float
    parameters: dict[str, int]
    rank: str
    device: str

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Of one run's training."""
        return self.tokens * self.flops_per_token

    def cell(self, point: Point, seed: int) -> Cell:
        """The run of this arm at a point."""
        own = {"train.steps": self.steps, "train.seed": seed}
        return Cell(tuple(sorted({**self.settings, **point, **own}.items())))

    def refusal(self, point: Point) -> str | None:
        """Why `nativerank train` would refuse to run this arm at a point, or None."""
        config, model = laid_out(self.source)
        optim = replace(config.optim, lr=point[LR], aux_lr=point[AUX_LR])
        try:
            check_optimizer(replace(config, optim=optim), model)
        except ValueError as error:
            return str(error)
        return None


@functools.cache
def laid_out(settings: str) -> tuple[RunConfig, nn.Module]:
    """The resolved configuration of these settings (JSON), and its model as shapes on the meta device.

    Raises:
        ValueError: whatever `nativerank train` would refuse before it builds weights.
    """
    config = resolve(configured(json.loads(settings)))
    pick_device(config.device or "cpu")
    dataset = open_data(config, quiet=True)
    if config.init:
        model: nn.Module = initial_model(config, dataset)[0].to("meta")
    else:
        model, _ = new_skeleton(config, dataset.vocab_size, dataset.eot_id)
    check_fit(config, dataset, model)
    probed_names(model, config.train.probe)
    return config, model


def check_optimizer(config: RunConfig, model: nn.Module) -> None:
    """Raises a ValueError if the configuration's optimizer cannot be."""
    # A schedule of no guided step frees the guides at once: of a copy, as the model serves for other rates too.
    optimizer_for(config, copy.deepcopy(model) if guided_layers(model) else model)


@functools.cache
def measured(settings: str) -> dict[str, Any]:
    """What the configuration of these settings (JSON) leads to, counted on its model of shapes.

    Raises:
        ValueError: whatever `nativerank train` would refuse before its first step.
    """
    config, model = laid_out(settings)
    check_optimizer(config, model)
    t, m, o = config.train, config.model, config.optim
    assert t.steps and t.context and config.method
    flops = flops_per_token(model, t.context, guided_share(config.guide.share, config.guide.stochastic))
    r = config.rank
    rank = "" if find_method(config.method).layer is None else f"{r.energy or r.value or r.ratio or 'given'}"
    start = dict(zip(COORDINATES, (o.lr, o.aux_lr, m.init_scale), strict=True))
    return {
        "source": settings,
        "start": {key: value for key, value in start.items() if value is not None},
        "steps": t.steps,
        "tokens_per_step": tokens_per_step(t),
        "flops_per_token": flops.training,
        "parameters": count_parameters(without_guides(model)),
        "rank": rank,
        "device": config.device or "cpu",
    }


def without_guides(model: nn.Module) -> nn.Module:
    """The model as training leaves it."""
    if not guided_layers(model):
        return model
    model = copy.deepcopy(model)
    for layer in guided_layers(model).values():
        layer.free_guide()
    return model
