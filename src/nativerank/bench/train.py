"""How long a training step takes, in its parts, for several contestants by turns on the same batches.

Who can take part stands in `bench.contestants`. Shapes are a preset's, or scaled to another width with the preset's
proportions; tokens are random. A vocabulary of 64 leaves of the model little more than its stack of blocks. FLOPs are
exact ones (`accounting.flops`: ranks, attention and head included, recomputation not).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nativerank.accounting.flops import flops_per_token
from nativerank.bench.contestants import HF_DENSE, PHASES, Contestant, Ours, check_batch, make, split_name, to_stderr
from nativerank.bench.measure import check_sizes, check_threads, measured_by, medians, rounds, with_threads
from nativerank.bench.measure import ratio as paired
from nativerank.bench.record import raced, record
from nativerank.config import TrainConfig
from nativerank.evaluate.probes import TOKENS, Probe, probed_names
from nativerank.methods import find_method
from nativerank.models import DENSE, Preset, count_parameters, find_preset, scaled
from nativerank.train.setup import pick_device
from nativerank.train.step import Batch, Stopwatch

METHODS = ("spectron", "lowrank-adamw", "dense-adamw", HF_DENSE)
WARMUP = 2
IN_A_ROW = 4  # steps on CUDA
Seconds = dict[str, list[float]]


def bench_train(
    preset_name: str = "demo",
    methods: Sequence[str] = METHODS,
    d_model: int | None = None,
    layers: int | None = None,
    context: int | None = None,
    tokens: int | None = None,
    vocab_size: int | None = None,
    ratio: float | None = None,
    repeats: int = 7,
    threads: int | None = None,
    clock: str = "wall",
    device: str = "cpu",
) -> dict[str, Any]:
    """Steps of every contestant by turns.

    Args:
        preset_name: shapes and batch. d_model, layers, context, vocab_size: override them.
        methods: contestants, METHOD[+SWITCH...] or hf-dense; the last dense one is the reference, if there is one.
        tokens: of a step; None takes the preset's sequences.
        ratio: rank over d_in, by the rank rule; None takes the preset's ranks.
        repeats: recorded steps of each, after two unrecorded ones.
        threads: None takes what PyTorch uses. clock: "cpu" takes processor time, of one thread.
        device: cpu, cuda or mps.

    Raises:
        ValueError: an unknown or repeated contestant, fewer than two, or a size below 1.
    """
    check_sizes(repeats=repeats, d_model=d_model, layers=layers, context=context, vocab_size=vocab_size, tokens=tokens)
    check_threads([threads] if threads is not None else None)
    names = list(methods)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"--methods takes two contestants at least, each once, got {' '.join(names) or 'none'}")
    for name in names:
        split_name(name)
    preset = shapes(preset_name, d_model, layers, context, vocab_size, ratio)
    check_batch(tokens, preset.context)
    tokens = tokens or preset.batch_size * preset.context
    where = pick_device(device)
    (count,) = counts = [threads or torch.get_num_threads()]
    notes: list[str] = []

    def note(name: str, message: str) -> None:
        notes.append(f"{name}: {message}")
        to_stderr(notes[-1])

    with measured_by(clock, counts, where):
        for _ in with_threads(counts, where):
            sides = [make(name, preset, where, partial(note, name)) for name in names]
            found = run(sides, preset, tokens, repeats, where)
    settings = {"preset": preset_name, "methods": names, "d_model": preset.d_model, "layers": preset.layers}
    settings |= {"context": preset.context, "tokens": tokens, "vocab_size": preset.vocab_size}
    settings |= {"ratio": preset.ratio, "rank": preset.value, "repeats": repeats, "threads": threads}
    settings |= {"clock": clock, "device": device}
    case = {"tokens": tokens, "threads": count}
    return record("train", settings, [summary(case, sides, *found, preset.context)], where, notes=notes)


def shapes(
    preset_name: str,
    d_model: int | None,
    layers: int | None,
    context: int | None,
    vocab_size: int | None,
    ratio: float | None,
) -> Preset:
    """The preset with what was asked for instead."""
    preset = scaled(find_preset(preset_name.removesuffix(DENSE)), d_model, layers)
    if ratio is not None:
        preset = replace(preset, ratio=ratio, value=None)
    return replace(preset, context=context or preset.context, vocab_size=vocab_size or preset.vocab_size)


def run(
    sides: Sequence[Contestant], preset: Preset, tokens: int, repeats: int, device: torch.device
) -> tuple[dict[str, Seconds], Seconds, Seconds]:
    """Seconds by contestant and phase, of whole steps, and of the probes around them, for every recorded round.

    Waiting for CUDA after each phase adds to a step what the host needs to launch the next one's kernels. `nativerank
    train` does not wait, so there whole steps are others than those whose phases are timed, several in a row.
    """
    seconds: dict[str, Seconds] = {side.name: {phase: [] for phase in PHASES} for side in sides}
    probes: Seconds = {side.name: [] for side in sides if isinstance(side, Ours)}
    whole: Seconds = {side.name: [] for side in sides}
    generator = torch.Generator().manual_seed(0)
    for in_order, counts in rounds(sides, repeats, WARMUP):
        ids = torch.randint(preset.vocab_size, (tokens // preset.context, preset.context + 1), generator=generator)
        ids = ids.to(device)
        batch: Batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)
        for side in in_order:
            took, probe = probed_step(side, batch, device)
            step = in_a_row(side, batch, device) if device.type == "cuda" else sum(took.values())
            if counts:
                whole[side.name].append(step)
                for phase in PHASES:
                    seconds[side.name][phase].append(took[phase])
                if side.name in probes:
                    probes[side.name].append(probe)
    return seconds, whole, probes


def in_a_row(side: Contestant, batch: Batch, device: torch.device, steps: int = IN_A_ROW) -> float:
    """Seconds of a step, of several that nothing waits for but the last."""
    watch = Stopwatch(device, wait=True)
    for _ in range(steps):
        side.step(batch, wait=False)
    watch.mark("steps")
    return watch.seconds["steps"] / steps


def probed_step(side: Contestant, batch: Batch, device: torch.device) -> tuple[dict[str, float], float]:
    """One update: seconds per phase, and of the loop's probe around it."""
    if not isinstance(side, Ours):
        return side.step(batch), 0.0
    probe = Probe(side.model, probed_names(side.model), batch[0][:1, :TOKENS])
    watch = Stopwatch(device, wait=True)
    before = probe.before()
    watch.mark("probe")
    took = side.step(batch)
    watch.mark("step")
    probe.after(before, side.optimizer.param_groups[0]["lr"], side.optimizer.records())
    watch.mark("probe")
    return took, watch.seconds["probe"]


def summary(
    case: dict[str, int],
    sides: Sequence[Contestant],
    seconds: dict[str, Seconds],
    whole: Seconds,
    probes: Seconds,
    context: int,
) -> dict[str, Any]:
    """The record's case.

    Besides what every race has: per contestant `phases` (median seconds), `tokens_per_second`, `optimizer_share` of the
    step, `probe_share` (its seconds over those of the steps of a default interval), `parameters`, `flops_per_token` and
    `flop_share` of the reference's; and `optimizer_adds`: what clipping and the optimizer take beyond those of
    lowrank-adamw with the same switches, over its step.
    """
    timed = {name: totals(parts) for name, parts in seconds.items()}
    middle = medians(whole)
    first = reference(list(whole))
    flops = {side.name: flops_per_token(side.model, context).training for side in sides}
    interval = TrainConfig().probe_every
    return raced(
        case,
        first,
        whole,
        phases={name: medians(parts) for name, parts in seconds.items()},
        tokens_per_second={name: case["tokens"] / value for name, value in middle.items()},
        optimizer_share={name: paired(parts["optimizer"], timed[name]) for name, parts in seconds.items()},
        optimizer_adds=optimizer_adds(seconds, timed),
        probe_share={name: value / (interval * middle[name]) for name, value in medians(probes).items()},
        parameters={side.name: count_parameters(side.model) for side in sides},
        flops_per_token=flops,
        flop_share={name: value / flops[first] for name, value in flops.items()},
    )


def totals(parts: Seconds) -> list[float]:
    """Of whole steps."""
    return [sum(step) for step in zip(*parts.values(), strict=True)]


def reference(names: Sequence[str]) -> str:
    """The last dense contestant, else the last."""
    dense = [name for name in names if is_dense(name)]
    return (dense or list(names))[-1]


def is_dense(name: str) -> bool:
    """Whether this contestant's matrices are."""
    method, _ = split_name(name)
    return method == HF_DENSE or find_method(method).layer is None


def optimizer_adds(seconds: dict[str, dict[str, list[float]]], whole: Seconds) -> dict[str, float]:
    """For factors whose plain AdamW twin took part: a median over rounds, so what other phases' noise is stays out."""
    adds = {}
    for name, parts in seconds.items():
        twin = "+".join(["lowrank-adamw", *name.split("+")[1:]])
        if name != twin and twin in seconds and not is_dense(name):
            extra = [sum(ours) - sum(twins) for ours, twins in zip(late(parts), late(seconds[twin]), strict=True)]
            adds[name] = paired(extra, whole[twin])
    return adds


def late(parts: Seconds) -> list[tuple[float, float]]:
    """Clipping and update of each round."""
    return list(zip(parts["clip"], parts["optimizer"], strict=True))
