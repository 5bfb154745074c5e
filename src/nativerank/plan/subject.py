"""What is planned: a resolved configuration as a model without numbers, its processes and its dense twin.

A plan needs neither data nor memory. The vocabulary is that of `data.path` where one is given, else the model's own;
the processes are those of `parallel.*` and of the number of devices, whether or not they exist here.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from nativerank.config import GuideConfig, OptimConfig, RankConfig, RunConfig
from nativerank.data.shards import Dataset
from nativerank.distributed.start import grid_shape
from nativerank.hub.load import base_config, outline
from nativerank.layers import FactorizeReport
from nativerank.methods import find_method
from nativerank.models import DENSE, find_preset, hf_config, read_hf_config
from nativerank.train.resolve import check_parallel, resolve, share_of_batch, tokens_per_step
from nativerank.train.setup import new_skeleton, set_up_passes

TWIN = "dense-adamw"


@dataclass(frozen=True)
class Processes:
    """The grid of a plan, as `distributed.grid.Grid` counts it."""

    replicas: int = 1
    shards: int = 1

    @property
    def world(self) -> int:
        """How many there are."""
        return self.replicas * self.shards


@dataclass(frozen=True)
class Subject:
    """A configuration that is planned.

    Attributes:
        config: resolved.
        vocab_size: of the data; rows of the token embedding of a preset.
        processes: that share it.
        sequences, passes: of one forward and backward pass of one process, and how many a step has.
    """

    config: RunConfig
    vocab_size: int
    processes: Processes
    sequences: int
    passes: int

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        assert self.config.train.context
        return self.config.train.context

    @property
    def tokens_per_step(self) -> int:
        """Of all processes together."""
        return tokens_per_step(self.config.train)

    @property
    def steps(self) -> int:
        """Of the run."""
        assert self.config.train.steps
        return self.config.train.steps

    @property
    def dense(self) -> bool:
        """Whether it has no factors."""
        return find_method(self.config.method or "").layer is None

    def width(self) -> int:
        """d_model."""
        text = base_config(Path(self.config.init)) if self.config.init else self.hf_config()
        return int(text.get_text_config().hidden_size)

    def equal_blocks(self) -> int | None:
        """How many blocks there are, if they are all alike; None where they may differ."""
        config = self.config
        if config.init or config.rank.overrides or config.rank.include or config.rank.exclude:
            return None
        text = self.hf_config().get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ())
        return int(text.num_hidden_layers) if config.model.config is None or self._plain(text, kinds) else None

    @staticmethod
    def _plain(text: Any, kinds: set[str]) -> bool:
        """Whether an architecture of one's own repeats one kind of block."""
        mixed = ("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers", "attn_layer_indices")
        return len(kinds) < 2 and not any(getattr(text, name, None) for name in mixed)

    def hf_config(self) -> Any:
        """The transformers config of the model."""
        m = self.config.model
        if m.config:
            return read_hf_config(m.config)
        return hf_config(find_preset(m.preset), self.vocab_size, self.config.train.context)

    def build(self, depth: int | None = None, to_run: bool = False) -> tuple[nn.Module, FactorizeReport | None]:
        """The model on the meta device in training mode, and what became what.

        Args:
            depth: so many of its blocks; None is all.
            to_run: its passes run as in training, else they are never run.
        """
        model, report = (
            (outline(Path(self.config.init)), None)
            if self.config.init
            else new_skeleton(self.config, self.vocab_size, None, depth)
        )
        model.train()
        if to_run:
            set_up_passes(self.config, model)
        return model, report


def subject(config: RunConfig, devices: int | None = None) -> Subject:
    """A configuration resolved and spread over processes.

    Args:
        config: as from flags.
        devices: processes to plan for; None follows from parallel.replicas and parallel.shards.

    Raises:
        ValueError: what a run would refuse: values that contradict each other, processes that cannot share a step, a
            folder that holds no prepared data.
    """
    resolved = resolve(replace(config, out=config.out or "runs/plan"))
    p = config.parallel
    world = devices or (p.replicas or 1) * (p.shards or 1)
    shape = Processes(*grid_shape(p.mode, p.replicas, p.shards, world, 1, resolved.device or "cpu"))
    check_parallel(resolved, shape)  # type: ignore[arg-type]  # which reads world and shards alone
    sequences, passes = share_of_batch(resolved.train, shape.world)
    return Subject(resolved, vocabulary(resolved), shape, sequences, passes)


def vocabulary(config: RunConfig) -> int:
    """Tokens that the data knows; without data those of --init or of model.config, or the preset's number."""
    if config.data.path is not None:
        return Dataset.open(Path(config.data.path)).vocab_size
    if config.init or config.model.config:
        text = base_config(Path(config.init)) if config.init else read_hf_config(str(config.model.config))
        return int(text.get_text_config().vocab_size)
    return find_preset(config.model.preset).vocab_size


def dense_twin(config: RunConfig) -> RunConfig | None:
    """The same architecture, batch and processes with dense matrices and AdamW; None for what is dense already.

    Keys that dense matrices do not have are left out; `train.recompute up`, which they do not have either, becomes
    "blocks".
    """
    preset = find_preset(config.model.preset)
    if find_method(config.method or preset.method).layer is None or config.init:
        return None
    o, t = config.optim, config.train
    kept = ("weight_decay", "clip", "schedule", "warmup", "decay", "final_lr", "betas", "eps", "layerwise")
    return replace(
        config,
        method=TWIN,
        rank=RankConfig(),
        guide=GuideConfig(),
        optim=OptimConfig(
            **{name: getattr(o, name) for name in kept}, state_dtype=o.state_dtype, aux_state_dtype=o.aux_state_dtype
        ),
        model=replace(config.model, init_scale=None, preset=config.model.preset.removesuffix(DENSE)),
        train=replace(
            t, recompute="blocks" if t.recompute == "up" else t.recompute, float8=False, float8_emulate=False
        ),
    )
