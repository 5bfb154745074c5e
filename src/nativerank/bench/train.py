"""How long a training step takes, in its parts, beside the dense twin's.

Steps of both models are interleaved. The loop's own `train_step` is what runs, with the loop's own probe around it,
timed apart. Shapes are a preset's, or scaled to another width with the preset's proportions.
"""

import statistics
from typing import Any

import torch

from nativerank.bench.measure import check_sizes, ratio, rounds
from nativerank.config import TrainConfig
from nativerank.evaluate.probes import TOKENS, Probe, probed_names
from nativerank.methods import build_optimizer, factorize, find_method
from nativerank.models import DENSE, Preset, count_parameters, find_preset, hf_config, materialize, scaled, skeleton
from nativerank.train.setup import pick_device, versions
from nativerank.train.step import Batch, Stopwatch, train_step

PHASES = ("forward", "backward", "clip", "optimizer")


class Contestant:
    """A model with its optimizer and the seconds of its steps."""

    def __init__(self, preset: Preset, method: str, device: torch.device):
        self.method, self.device = method, device
        model, row = skeleton(hf_config(preset)), find_method(method)
        if row.layer:
            factorize(model, method, rank_ratio=preset.ratio, rank=preset.value)
        self.model = materialize(model, seed=0, init_scale=row.rates.init_scale, init="sampled").to(device).train()
        self.optimizer = build_optimizer(self.model, method)
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.probe_seconds: list[float] = []

    def step(self, batch: Batch, record: bool) -> None:
        """One update on one batch, probed."""
        probe = Probe(self.model, probed_names(self.model), batch[0][:1, :TOKENS])
        watch = Stopwatch(self.device, wait=True)
        before = probe.before()
        watch.mark("probe")
        result = train_step(self.model, self.optimizer, [batch], accumulation=1, clip=1.0)
        watch.mark("step")
        probe.after(before, self.optimizer.param_groups[0]["lr"], self.optimizer.records())
        watch.mark("probe")
        if record:
            self.probe_seconds.append(watch.seconds["probe"])
            for phase in PHASES:
                self.seconds[phase].append(result.seconds[phase])

    def summary(self, tokens: int) -> dict[str, Any]:
        """Median seconds per phase, of the whole step, and what follows from them.

        probe_share: seconds of a probe over those of the steps of a default interval.
        """
        totals = [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]
        step = statistics.median(totals)
        seconds = {phase: statistics.median(values) for phase, values in self.seconds.items()}
        probe = statistics.median(self.probe_seconds)
        return {
            "method": self.method,
            "parameters": count_parameters(self.model),
            "seconds": {**seconds, "step": step, "probe": probe},
            "spread": {"min": min(totals), "max": max(totals)},
            "tokens_per_second": tokens / step,
            "optimizer_share": seconds["optimizer"] / step,
            "probe_share": probe / (TrainConfig().probe_every * step),
        }


def bench_train(
    preset_name: str = "demo",
    method: str = "spectron",
    dense_method: str = "dense-adamw",
    d_model: int | None = None,
    layers: int | None = None,
    batch_size: int | None = None,
    repeats: int = 7,
    device: str = "cpu",
) -> dict[str, Any]:
    """Times a low-rank method against a dense one on equal shapes and random tokens.

    Args:
        preset_name: shapes and batch. d_model, layers, batch_size: override them.
        method: the low-rank side. dense_method: the other side.
        repeats: recorded steps of each, after two unrecorded ones.
        device: cpu, cuda or mps.

    Returns:
        Both sides' medians, and `speedup`: dense step seconds over low-rank step seconds (median of paired ratios).
    """
    check_sizes(repeats=repeats, d_model=d_model, layers=layers, batch_size=batch_size)
    if find_method(method).layer is None or find_method(dense_method).layer is not None:
        raise ValueError(f"bench train compares a low-rank method with a dense one, got {method} and {dense_method}")
    preset = scaled(find_preset(preset_name.removesuffix(DENSE)), d_model, layers)
    batch_size = batch_size or preset.batch_size
    where = pick_device(device)
    sides = [Contestant(preset, method, where), Contestant(preset, dense_method, where)]
    generator = torch.Generator().manual_seed(0)
    for in_order, record in rounds(sides, repeats, warmup=2):
        ids = torch.randint(preset.vocab_size, (batch_size, preset.context + 1), generator=generator).to(where)
        for side in in_order:
            side.step((ids[:, :-1], ids[:, 1:], None), record)
    tokens = batch_size * preset.context
    steps = [[sum(parts) for parts in zip(*side.seconds.values(), strict=True)] for side in sides]
    return {
        "benchmark": "train",
        "preset": preset_name,
        "d_model": preset.d_model,
        "layers": preset.layers,
        "tokens_per_step": tokens,
        "repeats": repeats,
        "low_rank": sides[0].summary(tokens),
        "dense": sides[1].summary(tokens),
        "speedup": ratio(steps[1], steps[0]),
        "environment": versions(),
    }
