"""The models that `nativerank bench generate` compares, and one generation of theirs by the clock."""

import copy
import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.hub.forms import DENSE, FACTORED, MERGED
from nativerank.hub.generate import continue_ids
from nativerank.hub.sampling import Chooser, Sampling
from nativerank.layers import to_dense_modules
from nativerank.layers.base import factor_layers
from nativerank.methods import factorize
from nativerank.models import DENSE as DENSE_PRESET
from nativerank.models import (
    Preset,
    check_predicts_next_token,
    find_preset,
    hf_config,
    materialize,
    scaled,
    skeleton,
)
from nativerank.train.trained import open_trained

PHASES = ("prefill", "decode")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the models of all forms come from.

    Attributes:
        folder: a run, a checkpoint or a model folder; None for a preset.
        preset, d_model, layers: of freshly drawn models.
    """

    folder: str | None = None
    preset: str = "demo"
    d_model: int | None = None
    layers: int | None = None

    def shapes(self) -> Preset:
        """The preset at the size that was asked for."""
        return scaled(find_preset(self.preset.removesuffix(DENSE_PRESET)), self.d_model, self.layers)

    def factored(self, rank_ratio: float | None) -> nn.Module:
        """On the CPU in evaluation mode.

        Raises:
            ValueError: a folder without factors, or what `open_trained` refuses.
        """
        if self.folder:
            model = open_trained(self.folder).model
            check_predicts_next_token(model, self.folder)
            if not factor_layers(model):
                raise ValueError(f"{self.folder} holds no factors, so there are no forms to compare")
            return model
        preset = self.shapes()
        rank = {"rank_ratio": preset.ratio, "rank": preset.value} if rank_ratio is None else {"rank_ratio": rank_ratio}
        model = skeleton(hf_config(preset))
        factorize(model, "spectron", **rank)
        return materialize(model, seed=0, init_scale=1.0, init="sampled").eval()

    def model(self, form: str, rank_ratio: float | None) -> nn.Module:
        """Of any form."""
        model = self.factored(rank_ratio)
        if form == FACTORED:
            return model
        to_dense_modules(model)
        return model if form == MERGED else dense_twin(model)


def dense_twin(merged: nn.Module) -> nn.Module:
    """The architecture of a model without factors, freshly drawn."""
    hf: Any = merged
    return materialize(skeleton(copy.deepcopy(hf.config)), seed=0, init_scale=1.0, init="sampled").eval()


class Clock:
    """A streamer that keeps when each token came, by one of CLOCKS; the first entry is the start."""

    def __init__(self, kind: str = "wall") -> None:
        self.read, self.times = CLOCKS[kind], list[float]()

    def put(self, value: Tensor) -> None:
        self.times.append(self.read())

    def end(self) -> None:
        """Nothing is held back."""

    def seconds(self) -> dict[str, float]:
        """Of the first token, and of the others."""
        return {"prefill": self.times[1] - self.times[0], "decode": self.times[-1] - self.times[1]}


def random_prompts(model: nn.Module, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Ids (batch, tokens)."""
    hf: Any = model
    vocab = hf.get_input_embeddings().num_embeddings
    return torch.randint(vocab, (batch, tokens), generator=torch.Generator().manual_seed(batch)).to(device)


def write_once(model: nn.Module, ids: Tensor, new_tokens: int, kind: str = "wall", **how: Any) -> dict[str, float]:
    """Seconds of prefill and decode of one greedy generation without an end; `how` goes to transformers' generate."""
    clock, chooser = Clock(kind), Chooser(Sampling(temperature=0), [], ids.device)
    continue_ids(model, ids, torch.ones_like(ids), new_tokens, chooser, (), streamer=clock, **how)
    assert len(clock.times) == new_tokens + 1
    return clock.seconds()


class Side:
    """A model in one form and the seconds it took, by batch."""

    def __init__(self, form: str, rank_ratio: float | None, model: nn.Module):
        self.form, self.rank_ratio, self.model = form, rank_ratio, model
        self.seconds: dict[int, dict[str, list[float]]] = {}

    def record(self, batch: int, seconds: dict[str, float]) -> None:
        """Adds one generation."""
        kept = self.seconds.setdefault(batch, {phase: [] for phase in (*PHASES, "whole")})
        for phase in PHASES:
            kept[phase].append(seconds[phase])
        kept["whole"].append(sum(seconds.values()))

    def medians(self, batch: int) -> dict[str, float]:
        """Of every phase."""
        return {phase: statistics.median(values) for phase, values in self.seconds[batch].items()}

    def row(self, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Medians, and tokens per second of the whole batch."""
        seconds = self.medians(batch)
        return {
            "batch": batch,
            **{f"{phase}_seconds": value for phase, value in seconds.items()},
            "prefill_tokens_per_second": batch * prompt_tokens / seconds["prefill"],
            "decode_tokens_per_second": batch * (new_tokens - 1) / seconds["decode"],
            "tokens_per_second": batch * new_tokens / seconds["whole"],
        }


def make_sides(
    source: Source, ratios: list[float | None], device: torch.device, clock: str
) -> tuple[list[Side], float]:
    """All forms on the device, and the seconds that merging took."""
    sides = [Side(FACTORED, rank_ratio, source.factored(rank_ratio)) for rank_ratio in ratios]
    merged = copy.deepcopy(sides[0].model)
    began = CLOCKS[clock]()
    to_dense_modules(merged)
    seconds = CLOCKS[clock]() - began
    sides += [Side(MERGED, None, merged), Side(DENSE, None, dense_twin(merged))]
    for side in sides:
        side.model.to(device)
    return sides, seconds
