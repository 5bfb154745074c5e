"""From a configuration to the objects of a run: every default filled in, every conflict named before work starts."""

import functools
import math
import os
import platform
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from nativerank.config import RankConfig, RunConfig, TrainConfig, differences
from nativerank.data.demo import prepared_demo
from nativerank.data.shards import Dataset
from nativerank.evaluate.loss import check_document_mask
from nativerank.hub.load import load, tokenizer_fingerprint
from nativerank.layers import DEFAULT_RATIO, FactorizeReport
from nativerank.methods import build_optimizer, default_rates, factorize, find_method
from nativerank.models import DENSE, Preset, find_preset, hf_config, materialize, read_hf_config, skeleton
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.version import __version__

# What nothing else would notice before the run folder exists.
BOUNDS: dict[str, tuple[float, float]] = {
    **{f"train.{name}": (1, math.inf) for name in ("steps", "tokens", "batch_size", "accumulation", "context")},
    **{f"train.{name}": (0, math.inf) for name in ("eval_every", "checkpoint_every", "probe_every")},
    **{f"train.{name}": (1, math.inf) for name in ("eval_tokens", "keep")},
    **{f"optim.{name}": (0, math.inf) for name in ("lr", "aux_lr", "weight_decay", "clip")},
    **{f"optim.{name}": (0, 1) for name in ("warmup", "decay", "final_lr")},
    **{f"optim.{name}": (1, math.inf) for name in ("orthogonalizer_steps", "power_iterations")},
    **{f"model.{name}": (0, math.inf) for name in ("init_scale", "embedding_std")},
    **{f"guard.{name}": (1, math.inf) for name in ("window", "max_events", "sigma_factor")},
    "guard.loss_jump": (0, math.inf),
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
    own_architecture = config.model.config is not None
    rates = default_rates(method_name, "" if own_architecture else config.model.preset.removesuffix(DENSE))
    optim, model = config.optim, config.model
    optim = replace(
        optim,
        lr=rates.lr if optim.lr is None else optim.lr,
        aux_lr=rates.aux_lr if optim.aux_lr is None else optim.aux_lr,
        nesterov=method.options.get("nesterov", False) if optim.nesterov is None else optim.nesterov,
        shape_scale=optim.shape_scale or method.options.get("shape_scale", "none"),
    )
    if model.init_scale is None:
        model = replace(model, init_scale=rates.init_scale)
    if model.embedding_std is None and not own_architecture:
        model = replace(model, embedding_std=preset.embedding_std)
    name = Path(model.config).stem if model.config else model.preset
    return replace(
        config,
        method=method_name,
        model=model,
        rank=resolve_rank(config, preset, method_name),
        optim=optim,
        train=resolve_train(config, preset),
        out=config.out or free_folder(f"{name}-{method_name}"),
        device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def resolve_train(config: RunConfig, preset: Preset) -> TrainConfig:
    """Batch, context and number of steps: the preset's where they are not given; the context fits the model."""
    train = config.train
    if train.steps is not None and train.tokens is not None:
        raise ValueError(f"give train.steps or train.tokens, not both: {train.steps}, {train.tokens}")
    context = train.context or preset.context
    if config.model.config and not train.context:
        limit = getattr(read_hf_config(config.model.config).get_text_config(), "max_position_embeddings", None)
        context = min(context, limit or context)
    train = replace(
        train,
        batch_size=train.batch_size or preset.batch_size,
        accumulation=train.accumulation or (1 if train.batch_size else preset.accumulation),
        context=context,
    )
    if train.tokens is not None:
        return replace(train, steps=math.ceil(train.tokens / tokens_per_step(train)), tokens=None)
    return replace(train, steps=train.steps or preset.steps)


def resolve_rank(config: RunConfig, preset: Preset, method: str) -> RankConfig:
    """The preset's rank where none is given; a quarter of the width for other architectures."""
    rank = config.rank
    if find_method(method).layer is None:
        if rank != RankConfig():
            raise ValueError(
                f"{method} keeps dense matrices, so rank.{differences(rank, RankConfig())[0]} has no meaning"
            )
        return rank
    if rank.ratio is not None and rank.value is not None:
        raise ValueError(f"give rank.ratio or rank.value, not both: {rank.ratio}, {rank.value}")
    if rank.ratio is not None or rank.value is not None:
        return rank
    if config.model.config or preset.value is None:
        return replace(rank, ratio=DEFAULT_RATIO if config.model.config else preset.ratio)
    return replace(rank, value=preset.value)


def check_bounds(config: RunConfig) -> None:
    """Raises a ValueError naming the first key whose number is out of range."""
    for key, (low, high) in BOUNDS.items():
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
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


def pick_device(name: str) -> torch.device:
    """The device, if this machine has it."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise ValueError(f"--device {name}: this machine or this PyTorch build has none; use --device cpu")
    return torch.device(name)


def open_data(config: RunConfig, quiet: bool = False) -> Dataset:
    """The prepared folder of a run, the built-in corpus when none is named.

    Raises:
        ValueError: not a prepared folder, a damaged shard, another tokenizer, or an empty validation split.
    """
    if config.data.path is None:
        preset = find_preset(config.model.preset)
        dataset = Dataset.open(prepared_demo(preset.vocab_size, quiet=quiet))
    else:
        dataset = Dataset.open(config.data.path)
    dataset.tokenizer()  # compares its hash with the one the shards were made with
    if dataset.split("val").tokens < 2:
        raise ValueError(
            f"the validation split of {dataset.path} holds no tokens; prepare it with a larger --val_fraction"
        )
    return dataset


def data_fingerprint(dataset: Dataset) -> list[str]:
    """The hashes of everything a run reads: two folders with equal ones hold the same data."""
    splits = dataset.manifest["splits"]
    return [dataset.tokenizer_sha256, *(s["sha256"] for split in ("train", "val") for s in splits[split]["shards"])]


@dataclass
class Built:
    """A model with its optimizer, ready to train; `report` says what became what (None for dense methods)."""

    model: nn.Module
    optimizer: LowRankOptimizer
    report: FactorizeReport | None


def build(config: RunConfig, dataset: Dataset) -> Built:
    """The model of a resolved configuration with its initial (or --init) weights, and its optimizer.

    Raises:
        ValueError: a vocabulary smaller than the data's, a context beyond the model's, or what factorize and
            build_optimizer refuse.
    """
    device = pick_device(config.device or "cpu")
    if config.init:
        model, report = _initial_model(config, dataset)
    else:
        model, report = _new_model(config, dataset)
    hf: Any = model
    rows = hf.get_input_embeddings().num_embeddings
    if rows < dataset.vocab_size:
        raise ValueError(f"the model's vocabulary of {rows} is smaller than the data's {dataset.vocab_size}")
    limit = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    if limit and config.train.context and config.train.context > limit:
        raise ValueError(f"train.context {config.train.context} exceeds the model's max_position_embeddings {limit}")
    if config.data.document_mask:
        check_document_mask(model)
    model.to(device).train()
    o = config.optim
    optimizer = build_optimizer(
        model,
        config.method or "",
        lr=o.lr,
        aux_lr=o.aux_lr,
        weight_decay=o.weight_decay,
        betas=o.betas,
        eps=o.eps,
        momentum=o.momentum,
        nesterov=o.nesterov,
        shape_scale=o.shape_scale,
        orthogonalizer=o.orthogonalizer,
        orthogonalizer_steps=o.orthogonalizer_steps,
        norm=o.norm,
        power_iterations=o.power_iterations,
        certified=o.certified,
    )
    return Built(model, optimizer, report)


def _new_model(config: RunConfig, dataset: Dataset) -> tuple[nn.Module, FactorizeReport | None]:
    if config.model.config:
        hf = read_hf_config(config.model.config)
    else:
        hf = hf_config(find_preset(config.model.preset), dataset.vocab_size, config.train.context)
    model, report = skeleton(hf), None
    if find_method(config.method or "").layer:
        r = config.rank
        report = factorize(
            model,
            config.method or "",
            rank_ratio=r.ratio,
            rank=r.value,
            rank_rule=r.rule,
            include=r.include,
            exclude=r.exclude,
            overrides=r.overrides,
        )
    m = config.model
    assert m.init_scale is not None
    return materialize(model, config.train.seed, m.init_scale, config.rank.init, m.embedding_std), report


def _initial_model(config: RunConfig, dataset: Dataset) -> tuple[nn.Module, None]:
    assert config.init is not None
    model = load(config.init)
    found = tokenizer_fingerprint(Path(config.init))
    if found is not None and found != dataset.tokenizer_sha256:
        raise ValueError(
            f"{config.init} was trained with another tokenizer than the data in {dataset.path} was made with"
        )
    return model, None


def compile_blocks(model: nn.Module) -> None:
    """torch.compile of each repeated block: the members of the first ModuleList, which share one compilation."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile()
            return


def git_commit(folder: Path) -> str:
    """The commit of the repository that tracks this folder; "unknown" when it only lies inside somebody else's."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") if git("ls-files", ".") else "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache
def versions() -> dict[str, str]:
    """What a run depends on, for its records."""
    return {
        "nativerank": __version__,
        "commit": git_commit(Path(__file__).parent),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
