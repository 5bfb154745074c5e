"""From a resolved configuration to the objects of a run: the data, the model, its optimizer."""

import functools
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from nativerank.config import RunConfig
from nativerank.data.demo import prepared_demo
from nativerank.data.shards import Dataset
from nativerank.distributed.agree import from_each, together
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.wrap import deal, wrap
from nativerank.evaluate.loss import check_predictions
from nativerank.hub.load import load, outline, tokenizer_fingerprint
from nativerank.layers import FactorizeReport, join_products, matrix_parameters
from nativerank.methods import build_optimizer, factorize, find_method
from nativerank.models import allocate, context_length, find_preset, hf_config, materialize, read_hf_config, skeleton
from nativerank.optim.check import RULE_OPTIONS
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.roles import assign_roles, long_sides
from nativerank.train.checkpoint import fingerprint
from nativerank.train.distill import Teacher
from nativerank.train.float8 import compute_in_float8
from nativerank.train.recompute import recompute_blocks
from nativerank.train.teacher import open_teacher
from nativerank.version import __version__


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
        folder = prepared_demo(preset.vocab_size, quiet=quiet)
        try:
            dataset = open_checked(folder)
        except ValueError as error:
            raise ValueError(f"{error}; the built-in corpus is made again if you delete {folder}") from None
    else:
        dataset = open_checked(Path(config.data.path))
    if dataset.split("val").tokens < 2:
        raise ValueError(
            f"the validation split of {dataset.path} holds no tokens; prepare it with a larger --val_fraction"
        )
    return dataset


def open_checked(folder: Path) -> Dataset:
    """A prepared folder whose shards and tokenizer are those of its manifest, else a ValueError."""
    dataset = Dataset.open(folder)
    dataset.tokenizer()  # compares its hash with the one the shards were made with
    return dataset


def check_same_data(dataset: Dataset, grid: Grid) -> None:
    """Raises a ValueError, on every process, if one of them reads other data than the first."""
    found = from_each(grid, lambda: fingerprint(data_fingerprint(dataset)))
    with together(grid):
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(f"rank {rank} reads other data than rank 0 in {dataset.path}")


def data_fingerprint(dataset: Dataset) -> list[str]:
    """The hashes of everything a run reads: two folders with equal ones hold the same data."""
    splits = dataset.manifest["splits"]
    return [dataset.tokenizer_sha256, *(s["sha256"] for split in ("train", "val") for s in splits[split]["shards"])]


@dataclass
class Built:
    """A model with its optimizer, ready to train.

    Attributes:
        model: its parameters are shards where the grid has shards.
        report: what became what; None for dense methods.
        forward: the module to call for the training loss; the model itself but in ddp.
        uneven: parameters that are cut along rows because their long side has no equal parts.
        teacher: whose predictions are learned too, whole on every process.
    """

    model: nn.Module
    optimizer: LowRankOptimizer
    report: FactorizeReport | None
    forward: nn.Module
    uneven: list[str]
    teacher: Teacher | None = None


def gradient_grid(config: RunConfig, grid: Grid) -> Grid:
    """The processes that exchange gradients and share an optimizer."""
    return grid.within_replica() if config.parallel.diloco.every else grid


def build(config: RunConfig, dataset: Dataset, fresh: bool = True, grid: Grid = SINGLE) -> Built:
    """The model of a resolved configuration with its initial (or --init) weights, and its optimizer.

    Args:
        config: resolved.
        dataset: decides the vocabulary of a preset.
        fresh: False leaves the weights undrawn, for those of a checkpoint.
        grid: of all processes. The first one of those that exchange gradients draws or reads the weights, in its host
            memory, and deals them out.

    Raises:
        ValueError: a vocabulary smaller than the data's, a context beyond the model's, or what factorize,
            build_optimizer and open_teacher refuse.
    """
    own = gradient_grid(config, grid)
    with together(grid):
        model, report = whole_model(config, dataset, fresh, own)
    # Here processes talk to each other, so one that fails leaves alone.
    drawn = {name: p.detach() for name, p in model.named_parameters()} if own.rank == 0 else {}
    forward, uneven = spread(config, model, own)
    if fresh and own.shards > 1:
        deal(model, drawn, own)
    with together(grid):
        optimizer = optimizer_for(config, model, own)
    return Built(model, optimizer, report, forward, uneven, open_teacher(config, dataset, model, grid))


def whole_model(
    config: RunConfig, dataset: Dataset, fresh: bool, grid: Grid
) -> tuple[nn.Module, FactorizeReport | None]:
    """What `build` spreads over the grid, and what became what; asks no other process."""
    device = pick_device(config.device or "cpu")
    if config.init:
        model, report = initial_model(config, dataset, fresh and grid.rank == 0)
    else:
        model, report = _new_model(config, dataset, fresh and grid.rank == 0)
    check_fit(config, dataset, model)
    if grid.shards == 1:
        model.to(device)
    model.train()
    if config.train.float8:
        compute_in_float8(model, device, config.train.float8_emulate)
    set_up_passes(config, model)
    return model, report


def set_up_passes(config: RunConfig, model: nn.Module) -> None:
    """How forward and backward passes of a model run in training: joint products, recomputation."""
    join_products(model)
    if config.train.recompute != "none":
        recompute_blocks(model, config.train.recompute)


def spread(config: RunConfig, model: nn.Module, grid: Grid) -> tuple[nn.Module, list[str]]:
    """Wraps a model for its grid, see `distributed.wrap`; its matrices are cut along their long sides."""
    p, method = config.parallel, find_method(config.method or "")
    roles = assign_roles(model, () if method.layer else matrix_parameters(model))
    return wrap(
        model,
        grid,
        long_sides(roles),
        reshard_after_forward=p.reshard_after_forward,
        **precisions(config, grid),
        unused=bool(roles.guides),
    )


def precisions(config: RunConfig, grid: Grid) -> dict[str, str | None]:
    """`precision` and `reduce` of `wrap`, by this device: bf16 and fp32 where CUDA computes in bfloat16 anyway."""
    p = config.parallel
    precision = p.precision or ("bf16" if config.device == "cuda" and grid.shards > 1 else None)
    return {"precision": precision, "reduce": p.reduce or ("fp32" if precision else None)}


def check_fit(config: RunConfig, dataset: Dataset, model: Any) -> None:
    """Raises a ValueError if the data's token ids or the context are beyond the model."""
    rows = model.get_input_embeddings().num_embeddings
    if rows < dataset.vocab_size:
        raise ValueError(f"the model's vocabulary of {rows} is smaller than the data's {dataset.vocab_size}")
    limit = context_length(model.config)
    if limit and config.train.context and config.train.context > limit:
        raise ValueError(f"train.context {config.train.context} exceeds the model's max_position_embeddings {limit}")


def optimizer_for(config: RunConfig, model: nn.Module, grid: Grid = SINGLE) -> LowRankOptimizer:
    """The optimizer of a resolved configuration; on the meta device too, where it costs nothing and checks the same.

    Raises:
        ValueError: what build_optimizer refuses.
    """
    o, t = config.optim, config.train
    guided: dict[str, Any] = {}
    if find_method(config.method or "").guided:
        guided = {
            "guided_steps": round(config.guide.share * (t.steps or 0)),
            "stochastic_guide": config.guide.stochastic,
        }
    return build_optimizer(
        model,
        config.method or "",
        lr=o.lr,
        aux_lr=o.aux_lr,
        aux_state_dtype=o.aux_state_dtype,
        nesterov=o.nesterov,
        shape_scale=o.shape_scale,
        frames=o.frames,
        layerwise=o.layerwise,
        seed=t.seed,
        grid=grid,
        algebra=config.parallel.algebra,
        **guided,
        **{name: getattr(o, name) for name in RULE_OPTIONS},
    )


def new_skeleton(
    config: RunConfig, vocab_size: int, eot_id: int | None, depth: int | None = None
) -> tuple[nn.Module, FactorizeReport | None]:
    """The model of a resolved configuration without --init, as shapes on the meta device; and what became what.

    Args:
        config: resolved.
        vocab_size: rows of a preset's token embedding.
        eot_id: ends a text, None where that is not known.
        depth: blocks, None for as many as the model has.
    """
    if config.model.config:
        hf = read_hf_config(config.model.config)
    else:
        hf = hf_config(find_preset(config.model.preset), vocab_size, config.train.context)
    if eot_id is not None:
        name_end_of_text(hf, eot_id)
    if depth is not None:
        cut_blocks(hf.get_text_config(), depth)
    model, report = skeleton(hf), None
    if find_method(config.method or "").layer:
        r = config.rank
        report = factorize(
            model,
            config.method or "",
            rank_ratio=r.ratio,
            rank=r.value,
            energy=r.energy,
            rank_rule=r.rule,
            include=r.include,
            exclude=r.exclude,
            overrides=r.overrides,
            guide=config.guide.init if find_method(config.method or "").guided else None,
            frames=config.optim.frames,
        )
    return model, report


def cut_blocks(text: Any, depth: int) -> None:
    """Leaves the first blocks of a transformers config."""
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:depth]


def _new_model(config: RunConfig, dataset: Dataset, fresh: bool) -> tuple[nn.Module, FactorizeReport | None]:
    model, report = new_skeleton(config, dataset.vocab_size, dataset.eot_id)
    if not fresh:
        return allocate(model), report
    m = config.model
    assert m.init_scale is not None
    return materialize(model, config.train.seed, m.init_scale, config.rank.init, m.embedding_std), report


def name_end_of_text(hf: Any, eot_id: int) -> None:
    """Writes the data's end-of-text id into a Hugging Face config, which is saved with the model.

    Not as pad_token_id, which would keep the token's embedding from being trained.
    """
    for part in (hf, hf.get_text_config()):
        part.bos_token_id = part.eos_token_id = eot_id


def initial_model(config: RunConfig, dataset: Dataset, weights: bool = True) -> tuple[Any, None]:
    """The model of --init, with its weights or memory for them, and no report."""
    assert config.init is not None
    model: Any = load(config.init) if weights else allocate(outline(Path(config.init)))
    if weights:
        check_predictions(model, f"--init {config.init}")
    found = tokenizer_fingerprint(Path(config.init))
    if found is not None and found != dataset.tokenizer_sha256:
        raise ValueError(
            f"{config.init} was trained with another tokenizer than the data in {dataset.path} was made with"
        )
    name_end_of_text(model.config, dataset.eot_id)
    return model, None


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
