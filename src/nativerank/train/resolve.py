"""Every default of a configuration filled in, every conflict named before work starts."""

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nativerank.config import (
    AdaptConfig,
    GuideConfig,
    ModelConfig,
    OptimConfig,
    RankConfig,
    RunConfig,
    TrainConfig,
    differences,
)
from nativerank.distributed.grid import Grid
from nativerank.hub.load import base_config, layer_kind, outline
from nativerank.layers import DEFAULT_RATIO
from nativerank.linalg.energy import check_threshold
from nativerank.methods import default_rates, find_method, fitting_methods
from nativerank.models import (
    DENSE,
    Preset,
    check_predicts_next_token,
    context_length,
    family,
    find_preset,
    read_hf_config,
)
from nativerank.rank.schedule import resolve_adapt
from nativerank.train.teacher import check_distill

# What nothing else would notice before the run folder exists.
BOUNDS: dict[str, tuple[float, float]] = {
    **{f"train.{name}": (1, math.inf) for name in ("steps", "tokens", "batch_size", "accumulation", "context")},
    **{f"train.{name}": (0, math.inf) for name in ("eval_every", "checkpoint_every", "probe_every")},
    **{f"train.{name}": (1, math.inf) for name in ("eval_tokens", "keep")},
    **{f"optim.{name}": (0, math.inf) for name in ("lr", "aux_lr", "weight_decay", "clip", "s_lr")},
    **{f"optim.{name}": (0, 1) for name in ("warmup", "decay", "final_lr")},
    **{f"optim.{name}": (1, math.inf) for name in ("orthogonalizer_steps", "power_iterations", "retract_every")},
    **{f"model.{name}": (0, math.inf) for name in ("init_scale", "embedding_std")},
    **{f"guard.{name}": (1, math.inf) for name in ("window", "max_events", "sigma_factor")},
    "guard.loss_jump": (0, math.inf),
    "guide.share": (0, 1),
    "distill.weight": (0, 1),
    **{f"parallel.{name}": (1, math.inf) for name in ("replicas", "shards", "timeout")},
    "parallel.diloco.every": (0, math.inf),
    "parallel.diloco.lr": (0, math.inf),
    "parallel.diloco.momentum": (0, 1),
    "parallel.diloco.cap": (0, math.inf),
    "train.seed": (0, 2**63 - 1),
}


def resolve(config: RunConfig) -> RunConfig:
    """The same configuration with every None that a preset or method decides filled in.

    Raises:
        ValueError: an unknown method or preset, or values that contradict each other.
    """
    preset = find_preset(config.model.preset)
    method_name = config.method or preset.method
    method = find_method(method_name)
    if config.model.preset.endswith(DENSE) and method.layer:
        raise ValueError(
            f"preset {config.model.preset} is dense and method {method_name} is not; drop {DENSE} or --method"
        )
    check_bounds(config)
    check_guide(config, method_name)
    if config.init:
        check_init(config, method_name)
    defaults = method_defaults(config, method_name)
    optim, model = config.optim, config.model
    for name in (key.removeprefix("optim.") for key in defaults if key.startswith("optim.")):
        if getattr(optim, name) is None:
            optim = replace(optim, **{name: defaults[f"optim.{name}"]})
    if model.init_scale is None and not config.init:
        model = replace(model, init_scale=defaults["model.init_scale"])
    if model.embedding_std is None and not model.config and not config.init:
        model = replace(model, embedding_std=preset.embedding_std)
    train = resolve_train(config, preset)
    if optim.layerwise:
        check_layerwise(optim, train)
    if train.loss == "chunked" and config.distill.teacher:
        raise ValueError("train.loss chunked cannot go with a teacher, which is compared with all logits; leave it out")
    check_distill(replace(config, train=train))
    check_recompute(train, method_name)
    rank = resolve_rank(config, preset, method_name)
    check_float8(train, rank)
    return replace(
        config,
        method=method_name,
        model=model,
        rank=rank,
        optim=optim,
        train=train,
        out=config.out or free_folder(run_name(config, method_name)),
        device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def method_defaults(config: RunConfig, name: str) -> dict[str, Any]:
    """What a method decides where the configuration does not, by dotted key."""
    method = find_method(name)
    one = config.optim.frames == "one"  # and no s
    rates = default_rates(name, "" if config.model.config else family(config.model.preset))
    return {
        "optim.lr": rates.lr,
        "optim.aux_lr": rates.aux_lr,
        "optim.nesterov": method.options.get("nesterov", False),
        "optim.shape_scale": method.options.get("shape_scale", "none"),
        "optim.retraction": method.options.get("retraction", "cholesky"),
        "optim.update_cap": method.options.get("update_cap"),
        "optim.s_lr": None if one else method.options.get("s_lr"),
        "model.init_scale": rates.init_scale,
    }


def change_method(config: RunConfig, before: str, given: Collection[str]) -> RunConfig:
    """A configuration that was made for another method, for its own: that one's defaults are not taken along.

    Args:
        config: its method is the new one.
        before: the method that its other keys were made for.
        given: keys that were set for the new one.

    Raises:
        ValueError: a rate or option that was chosen by hand for the other method.
    """
    for key, default in method_defaults(config, before).items():
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        if key in given or value is None:
            continue
        if value != default:
            raise ValueError(f"{key} {value} was chosen for {before}; give --{key} too (null: {config.method}'s own)")
        config = replace(config, **{group: replace(getattr(config, group), **{name: None})})
    return config


def resolve_train(config: RunConfig, preset: Preset) -> TrainConfig:
    """Batch, context and number of steps: the preset's where they are not given; the context fits the model."""
    train = config.train
    if train.steps is not None and train.tokens is not None:
        raise ValueError(f"give train.steps or train.tokens, not both: {train.steps}, {train.tokens}")
    context = train.context or preset.context
    if (config.model.config or config.init) and not train.context:
        hf = read_hf_config(config.model.config) if config.model.config else base_config(Path(config.init or ""))
        context = min(context, context_length(hf) or context)
    train = replace(
        train,
        batch_size=train.batch_size or preset.batch_size,
        accumulation=train.accumulation or accumulation(train.batch_size, preset),
        context=context,
    )
    if train.tokens is not None:
        return replace(train, steps=math.ceil(train.tokens / tokens_per_step(train)), tokens=None)
    return replace(train, steps=train.steps or preset.steps)


def share_of_batch(train: TrainConfig, world: int) -> tuple[int, int]:
    """(sequences of one pass, passes per step) of each of `world` processes, so that together they read what one would:
    in as few passes of equal size, none larger than train.batch_size, as there can be.

    Raises:
        ValueError: they cannot share the sequences of a step evenly.
    """
    assert train.batch_size and train.accumulation
    sequences = train.batch_size * train.accumulation
    if sequences % world:
        raise ValueError(
            f"a step's {sequences} sequences (train.batch_size {train.batch_size} x train.accumulation "
            f"{train.accumulation}) cannot be shared evenly by {world} processes"
        )
    own = sequences // world
    passes = next(p for p in range(1, own + 1) if own % p == 0 and own // p <= train.batch_size)
    return own // passes, passes


def check_parallel(config: RunConfig, grid: Grid) -> None:
    """Raises a ValueError for a resolved configuration that this grid of processes cannot train."""
    share_of_batch(config.train, grid.world)
    if grid.world > 1 and config.optim.layerwise:
        raise ValueError(f"optim.layerwise is for one process, not for {grid.world}; drop --optim.layerwise")
    if grid.world > 1 and grid.shards == 1 and config.parallel.precision is not None:
        raise ValueError(f"parallel.precision {config.parallel.precision} is for fsdp and hsdp; ddp has whole weights")
    if grid.world > 1 and grid.shards == 1 and config.parallel.reduce == "bf16" and config.device != "cuda":
        raise ValueError("parallel.reduce bf16 with ddp needs CUDA; drop it, or take --parallel.mode fsdp")


def accumulation(batch_size: int | None, preset: Preset) -> int:
    """Passes per step that keep the preset's sequences per step at another batch size.

    Raises:
        ValueError: they are no whole number of passes.
    """
    if batch_size is None or (preset.accumulation == 1 and batch_size > preset.batch_size):
        return preset.accumulation
    sequences = preset.batch_size * preset.accumulation
    if sequences % batch_size:
        raise ValueError(
            f"train.batch_size {batch_size} does not divide the preset's {sequences} sequences per step; "
            "give --train.accumulation too"
        )
    return sequences // batch_size


def resolve_rank(config: RunConfig, preset: Preset, method: str) -> RankConfig:
    """The preset's rank where none is given; a quarter of the width for other architectures."""
    rank = config.rank
    if find_method(method).layer is None:
        if rank != RankConfig():
            raise ValueError(
                f"{method} keeps dense matrices, so rank.{differences(rank, RankConfig())[0]} has no meaning"
            )
        return rank
    rank = replace(rank, adapt=resolve_adapt(rank.adapt, config.compile))
    if rank.adapt.threshold is not None and config.optim.retract_every > 1 and find_method(method).rule == "sct":
        raise ValueError(
            f"rank.adapt reads energies off orthonormal frames, which optim.retract_every {config.optim.retract_every} "
            "does not keep; set --optim.retract_every 1"
        )
    if rank.energy is not None:
        check_threshold(rank.energy, "rank.energy")
    for other in ("value", "energy"):
        if rank.ratio is not None and getattr(rank, other) is not None:
            raise ValueError(f"give rank.ratio or rank.{other}, not both: {rank.ratio}, {getattr(rank, other)}")
    if any(given is not None for given in (rank.ratio, rank.value, rank.energy)) or config.init:
        return rank
    if config.model.config or preset.value is None:
        return replace(rank, ratio=DEFAULT_RATIO if config.model.config else preset.ratio)
    return replace(rank, value=preset.value)


def check_init(config: RunConfig, method: str) -> None:
    """Raises a ValueError for a key that --init overrules, a model that predicts no text, or a method not for it."""
    model = replace(config.model, preset=ModelConfig().preset)  # whose training settings still count
    rank = replace(config.rank, adapt=AdaptConfig())  # which starts from the ranks it brings
    ignored = differences(model, ModelConfig(), "model.") + differences(rank, RankConfig(), "rank.")
    if ignored:
        raise ValueError(f"--init {config.init} brings architecture and ranks along, so {ignored[0]} has no meaning")
    check_predicts_next_token(outline(Path(config.init or "")), f"--init {config.init}")
    frames = config.optim.frames
    kind, (wanted, _) = layer_kind(Path(config.init or "")), find_method(method).form(frames)
    if kind != wanted:
        chosen, fitting = f"{method} --optim.frames {frames}" if frames else method, ", ".join(fitting_methods(kind))
        what, way_out = (f"{kind} layers", "") if kind else ("dense matrices", ", or nativerank convert it first")
        raise ValueError(f"--init {config.init} holds {what}, which {chosen} does not train; take {fitting}{way_out}")


def check_layerwise(optim: OptimConfig, train: TrainConfig) -> None:
    """Raises a ValueError for what needs all gradients at once, which optim.layerwise never has."""
    for key, value, wanted in (("optim.clip", optim.clip, 0), ("train.accumulation", train.accumulation, 1)):
        if value != wanted:
            raise ValueError(
                f"optim.layerwise updates before all gradients are there, so it cannot go with {key} {value}; "
                f"set --{key} {wanted}"
            )


def check_float8(train: TrainConfig, rank: RankConfig) -> None:
    """Raises a ValueError for ranks that change under products that want multiples of 16, or emulation of nothing."""
    if train.float8_emulate and not train.float8:
        raise ValueError("train.float8_emulate says how train.float8 is done; set --train.float8 true too")
    if train.float8 and rank.adapt.mode not in (None, "off"):
        raise ValueError(f"train.float8 needs ranks that stay, so it cannot go with rank.adapt.mode {rank.adapt.mode}")


def check_recompute(train: TrainConfig, method: str) -> None:
    """Raises a ValueError for a choice between the products of factors that a dense method does not have."""
    if train.recompute == "up" and find_method(method).layer is None:
        raise ValueError(
            f"train.recompute up makes the second products of factors again, and {method} has no factors; "
            "take --train.recompute blocks"
        )


def check_guide(config: RunConfig, method: str) -> None:
    """Raises a ValueError for a guide that cannot be: of another method, of given weights, or in compiled blocks."""
    if not find_method(method).guided:
        if config.guide != GuideConfig():
            key = differences(config.guide, GuideConfig(), "guide.")[0]
            raise ValueError(f"{key} belongs to self-guided, not to {method}")
    elif config.init:
        raise ValueError(f"self-guided starts its guide with the factors, so it cannot take up --init {config.init}")
    elif config.compile:
        raise ValueError("self-guided layers change from step to step; drop --compile")


def check_bounds(config: RunConfig) -> None:
    """Raises a ValueError naming the first key whose number is out of range."""
    for key, (low, high) in BOUNDS.items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value is not None and not low <= value <= high:
            wanted = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            raise ValueError(f"{key} must be {wanted}, got {value}")


def tokens_per_step(train: Any) -> int:
    """batch_size * accumulation * context."""
    return int(train.batch_size * train.accumulation * train.context)


def free_folder(name: str, parent: str = "runs") -> str:
    """runs/NAME, or the first of runs/NAME-2, -3, ... that does not exist."""
    candidate, number = Path(parent) / name, 1
    while candidate.exists():
        number += 1
        candidate = Path(parent) / f"{name}-{number}"
    return str(candidate)


def run_name(config: RunConfig, method: str) -> str:
    """PRESET-METHOD; for an architecture of one's own the name of its config.json, or of the folder that holds it."""
    m = config.model
    if m.config is None:
        return f"{m.preset}-{method}"
    path = Path(m.config).absolute()
    return f"{path.parent.name if path.name == 'config.json' else path.stem}-{method}"
