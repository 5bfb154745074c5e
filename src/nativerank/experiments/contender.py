"""An arm with everything that follows from its configuration: where it starts, how long it runs, what that costs.

The model is built on the meta device alone, so a 70B is known in seconds.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

from nativerank.accounting.flops import flops_per_token, guided_share
from nativerank.experiments.arms import COORDINATES, Arm, configured
from nativerank.experiments.grid import Cell
from nativerank.hub.load import load
from nativerank.layers import guided_layers
from nativerank.methods import find_method
from nativerank.models import count_parameters
from nativerank.train.resolve import resolve, tokens_per_step
from nativerank.train.setup import new_skeleton, open_data

Point = dict[str, float]  # coordinate -> value


@dataclass(frozen=True)
class Contender:
    """An arm with everything that follows from its configuration.

    Args:
        arm: as it was entered.
        settings: of its cells, without coordinates, steps and seed.
        start: its coordinates where nobody moves them.
        steps, tokens_per_step: length of its runs.
        flops_per_token: of training, averaged over the run.
        parameters: total and non_embedding; a guide, which is gone at the end, left out.
        rank: as it was set, for tables; "" for dense matrices.
        device: that it runs on.
    """

    arm: Arm
    settings: dict[str, Any]
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


@functools.cache
def measured(settings: str) -> dict[str, Any]:
    """What the configuration of these settings (JSON) leads to, its model counted on the meta device.

    Raises:
        ValueError: whatever `nativerank train` would refuse before it builds weights.
    """
    config = resolve(configured(json.loads(settings)))
    t, m, o = config.train, config.model, config.optim
    assert t.steps and t.context and config.method
    dataset = open_data(config, quiet=True)
    model = load(config.init) if config.init else new_skeleton(config, dataset)[0]
    flops = flops_per_token(model, t.context, guided_share(config.guide.share, config.guide.stochastic))
    for layer in guided_layers(model).values():
        layer.free_guide()
    rank = "" if find_method(config.method).layer is None else f"{config.rank.value or config.rank.ratio or 'given'}"
    start = dict(zip(COORDINATES, (o.lr, o.aux_lr, m.init_scale), strict=True))
    return {
        "start": {key: value for key, value in start.items() if value is not None},
        "steps": t.steps,
        "tokens_per_step": tokens_per_step(t),
        "flops_per_token": flops.training,
        "parameters": count_parameters(model),
        "rank": rank,
        "device": config.device or "cpu",
    }
