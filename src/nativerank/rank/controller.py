"""When ranks change during training, and everything that changes with them.

    look     at scheduled steps: the spectrum of every trained matrix, and the rank that it asks for (`rank.energy`)
    resize   the layer's parameters and gradients (`layer.resize`), and the optimizer's state (`optimizer.resize`)
    record   ranks before and after, the energy that was kept, parameters now

A look is a function of weights, step and seed, so a resumed run repeats it bit for bit. A checkpoint keeps the ranks
that the run began with, the present ones and the limits of growth; `restore` brings a model built for the first to the
second before its tensors are read. Cost of a look: two Gram matrices or QR factorizations per matrix and O(r^3), a few
times in a run.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.config import AdaptConfig
from nativerank.distributed.wrap import reshard
from nativerank.layers import init_seed
from nativerank.layers.base import factor_layers
from nativerank.linalg.energy import kept_energy
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.reshape import reshape, resize
from nativerank.rank.energy import growth_limit, next_rank
from nativerank.rank.schedule import due
from nativerank.rank.spectra import spectra

PATIENCE = 2  # looks that new columns, which start from nothing, have before they can be dropped again


@dataclass(frozen=True)
class Change:
    """One look that changed something.

    ranks: name -> (before, after). energy: name -> share of ||W||_F^2 that is left, 1 for what grew.
    """

    ranks: dict[str, tuple[int, int]]
    energy: dict[str, float]


@dataclass
class Ranks:
    """What a checkpoint keeps: ranks at the start and now, limits of growth, looks since a matrix grew."""

    initial: dict[str, int]
    now: dict[str, int]
    limits: dict[str, int] = field(default_factory=dict)
    grown: dict[str, int] = field(default_factory=dict)


class RankController:
    """Adapts the ranks of a model's factor layers as training goes on.

    Args:
        model: its trainable factor layers are looked at.
        optimizer: holds their parameters; all processes that share these call `look` and `restore` together.
        adapt: what to do, resolved.
        steps: of the run, of which the schedule's shares are.
        seed: of the columns that are grown.
        multiple: looks come after a multiple of so many steps: when replicas that train on their own have met.

    Raises:
        ValueError: `min` or `max` that no matrix can reach.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: LowRankOptimizer,
        adapt: AdaptConfig,
        steps: int,
        seed: int = 0,
        multiple: int = 1,
    ):
        self.model, self.optimizer, self.adapt, self.steps, self.seed = model, optimizer, adapt, steps, seed
        self.multiple = multiple
        self.layers = {name: m for name, m in factor_layers(model).items() if m.factors()[0].requires_grad}
        largest = max((min(m.in_features, m.out_features) for m in self.layers.values()), default=0)
        for key, value in (("min", adapt.min), ("max", adapt.max)) if adapt.threshold is not None else ():
            if value is not None and value > largest:
                raise ValueError(
                    f"rank.adapt.{key} {value} is beyond min(d_in, d_out) of every matrix, {largest} at most"
                )
        ranks = {name: m.rank for name, m in self.layers.items()}
        self.ranks = Ranks(ranks, dict(ranks))

    def due(self, step: int) -> bool:
        """Whether the ranks are looked at after this many updates."""
        return due(self.adapt, step, self.steps, self.multiple)

    @torch.no_grad()
    def look(self, step: int) -> Change | None:
        """Changes what has to change after `step` updates.

        Raises:
            ValueError: a factor that is not finite, named; nothing has changed then.
        """
        reshard(self.model)
        found = spectra(self.layers, self.optimizer.layout.grid)
        wanted = {name: self._wanted(name, spectrum) for name, spectrum in found.items()}
        self.ranks.grown = {name: looks + 1 for name, looks in self.ranks.grown.items()}
        change, resizes = Change({}, {}), []
        for name, rank in wanted.items():
            before = self.layers[name].rank
            if rank == before:
                continue
            change.ranks[name], change.energy[name] = (before, rank), kept_energy(found[name], rank, name)
            generator = torch.Generator().manual_seed(init_seed(self.seed, f"{name}:rank:{step}"))
            resizes.append((self.layers[name], rank, generator))
            self._note(name, before, rank)
        if not change.ranks:
            return None
        resize(self.optimizer, self.model, resizes)
        return change

    def state(self) -> dict[str, Any]:
        """Plain numbers and names, for a checkpoint."""
        r = self.ranks
        return {"initial": r.initial, "now": r.now, "limits": r.limits, "grown": r.grown}

    @torch.no_grad()
    def restore(self, values: dict[str, Any], where: str) -> None:
        """Brings the model and its optimizer to the shapes of a checkpoint, whose tensors are read next.

        Args:
            values: of `state`.
            where: the checkpoint, for messages.

        Raises:
            ValueError: it belongs to a run with other ranks.
        """
        if values["initial"].keys() == self.ranks.initial.keys():
            for name, rank in self.ranks.initial.items():
                if values["initial"][name] != rank:
                    began = values["initial"][name]
                    raise ValueError(f"{where} began with rank {began} in {name}, this configuration with {rank}")
                if self.adapt.threshold is None and values["now"][name] != rank:
                    now = values["now"][name]
                    raise ValueError(f"{where} has rank {now} in {name}, this configuration {rank}; see rank.adapt")
            reshape(self.optimizer, self.model, [(m, values["now"][name]) for name, m in self.layers.items()])
            self.ranks = Ranks(**values)

    def _wanted(self, name: str, spectrum: Tensor) -> int:
        """The rank that a layer is to have; one that has just grown is not shrunk."""
        layer = self.layers[name]
        limit = self.ranks.limits.get(name, growth_limit(layer.in_features, layer.out_features, self.adapt.max))
        rank = next_rank(spectrum, limit, self.adapt, name)
        return layer.rank if rank < layer.rank and self.ranks.grown.get(name, PATIENCE) < PATIENCE else rank

    def _note(self, name: str, before: int, after: int) -> None:
        r = self.ranks
        r.now[name] = after
        if after > before:
            r.grown[name] = 0
        elif r.grown.pop(name, None) is not None:  # what had grown was not used
            r.limits[name] = after
