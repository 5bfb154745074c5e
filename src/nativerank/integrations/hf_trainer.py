"""Hugging Face Trainer: a callback for what changes shape during training.

    optimizer = nr.build_optimizer(model, "spectron", ...)
    Trainer(model, args, optimizers=(optimizer, None), callbacks=[NativerankCallback(threshold=0.97)])

The optimizer alone is enough for every method at fixed ranks: clipping, accumulation and learning rate schedules are
Trainer's. The callback adds two things. Ranks adapt to the energy of the spectra, as `nativerank train --rank.adapt`
does it, between the optimizer's step and the checkpoint. And `train(resume_from_checkpoint=True)` takes up ranks that
have changed, and knows when the guides of self-guided training have left, which happens within the optimizer's step.
What the controller keeps is in trainer_state.json. Of several processes, ranks and guides are for `nativerank train`.
"""

import logging
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nativerank.config import AdaptConfig
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.rank.controller import RankController, Ranks
from nativerank.rank.follow import follow_checkpoints
from nativerank.rank.schedule import resolve_adapt

logger = logging.getLogger(__name__)


class NativerankCallback(TrainerCallback, ExportableState):
    """Adapts ranks and makes checkpoints of changed shapes resume.

    Args:
        seed: of columns that are grown.
        adapt: `threshold` and the other keys of `config.AdaptConfig`; none of them, and ranks stay.

    Raises:
        ValueError: a value out of range, as `--rank.adapt` has it; from Trainer, another optimizer than
            `nr.build_optimizer` makes, or what that cannot do here.
    """

    def __init__(self, seed: int = 0, **adapt: Any):
        self.seed, self.adapt = seed, resolve_adapt(AdaptConfig(**adapt))
        self.controller: RankController | None = None
        self.ranks: dict[str, Any] | None = None  # of the controller, as a checkpoint keeps them
        self._given, self._followed = adapt, False

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps of this."""
        ranks = self.ranks if self.controller is None else self.controller.state()
        return {"args": {"seed": self.seed, **self._given}, "attributes": {"ranks": ranks}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Before anything is loaded: the model follows what is."""
        follow_checkpoints(parts["model"], our_optimizer(parts["optimizer"]))
        self._followed = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """With weights and optimizer loaded, if there is something to load."""
        model, optimizer = parts["model"], our_optimizer(parts["optimizer"])
        if not self._followed:
            follow_checkpoints(model, optimizer)
        check_arguments(args, optimizer, self.adapt)
        self.controller = RankController(model, optimizer, self.adapt, state.max_steps, self.seed)
        if state.global_step > 0 and (kept := kept_ranks(state, type(self).__name__)):
            check_ranks(kept["now"], self.controller.ranks.now)
            self.controller.ranks = Ranks(**kept)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """After the optimizer's step, before logs, evaluation and checkpoint."""
        assert self.controller is not None
        if self.controller.due(state.global_step) and (change := self.controller.look(state.global_step)):
            for name, (before, after) in change.ranks.items():
                logger.info("step %d: %s from rank %d to %d", state.global_step, name, before, after)


def our_optimizer(optimizer: Any) -> LowRankOptimizer:
    """The optimizer inside accelerate's wrapper."""
    inner = optimizer
    while not isinstance(inner, LowRankOptimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, LowRankOptimizer):
        found = type(inner).__name__
        raise ValueError(f"Trainer(optimizers=(nr.build_optimizer(model, ...), None)) is needed here, found {found}")
    return inner


def check_arguments(args: TrainingArguments, optimizer: LowRankOptimizer, adapt: AdaptConfig) -> None:
    """Raises a ValueError for what would fail in the middle of a run."""
    changing = "rank.adapt" if adapt.mode != "off" and adapt.mode else "self-guided" if optimizer.guides else None
    if changing and args.world_size > 1:
        raise ValueError(f"{changing} changes parameters, which Trainer's {args.world_size} processes do not notice")
    if optimizer.layerwise is not None and (args.max_grad_norm or args.gradient_accumulation_steps > 1):
        raise ValueError(
            "layerwise updates free each gradient at once: set max_grad_norm=0 and gradient_accumulation_steps=1, got "
            f"{args.max_grad_norm} and {args.gradient_accumulation_steps}"
        )


def kept_ranks(state: TrainerState, name: str) -> dict[str, Any] | None:
    """What a checkpoint kept of the controller; None where there was no callback."""
    found: Any = state.stateful_callbacks or {}
    entry = found.get(name)
    entry = entry[0] if isinstance(entry, list) else entry
    return entry["attributes"]["ranks"] if entry else None


def check_ranks(kept: dict[str, int], now: dict[str, int]) -> None:
    """Raises a ValueError unless the model has the ranks that a checkpoint says."""
    for name in kept.keys() | now.keys():
        if kept.get(name) != now.get(name):
            raise ValueError(f"the checkpoint has rank {kept.get(name)} in {name}, this model {now.get(name)}")
