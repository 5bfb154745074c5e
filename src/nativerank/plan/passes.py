"""One pass and one update of a plan, run on tensors without numbers (`accounting.trace`), as one process trains.

Three answers are given that training has otherwise: transformers asks the position ids whether a sequence holds several
documents, and without numbers would take it that it does, and build a mask (`one_document`); its dense experts are one
operator of its own, since PyTorch's describes bfloat16 alone (`experts_at_once`); chunks of the loss are those of the
planned device (`chunks_of`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nativerank.accounting.trace import OPTIMIZER, Trace, trace_step, trace_update
from nativerank.distributed.grid import Grid
from nativerank.distributed.wrap import DTYPES
from nativerank.evaluate import head_loss
from nativerank.evaluate.loss import check_loss, mean_loss
from nativerank.layers.guided import guided_layers
from nativerank.plan.subject import Subject
from nativerank.train.setup import optimizer_for, precisions


class Stage:
    """A model of so many blocks on tensors without numbers, to make passes and an update with.

    Args:
        planned: what is planned.
        depth: so many blocks; None is all.

    Raises:
        ValueError: train.loss asks for chunks of a model that takes none.
    """

    def __init__(self, planned: Subject, depth: int | None):
        self.planned, self.mode = planned, FakeTensorMode(allow_non_fake_inputs=True)
        self.model, _ = planned.build(depth, to_run=True)
        config, shape = planned.config, planned.processes
        wide = DTYPES[precisions(config, Grid(replicas=shape.replicas, shards=shape.shards))["precision"]]
        if shape.shards > 1 and wide is not None:
            self.model.to(wide)  # weights are gathered so; the shards are in `held`
        with self.mode, self._documents(), experts_at_once():
            self.model.to_empty(device="cpu")
            check_loss(self.model, config.train.loss)  # asks the model now: its answer is no part of a pass

    def run(self, sequences: int, guided: bool = True) -> Trace:
        """One pass of so many sequences, with the guides of a self-guided run or without; gradients are there before
        where `resident` says so.
        """
        config = self.planned.config
        for layer in guided_layers(self.model).values():
            layer.active = guided
        chunked = config.train.loss != "whole"
        with self.mode, chunks_of(self.planned), self._documents(), experts_at_once():
            ids = torch.zeros(sequences, self.planned.context, dtype=torch.long)
            self._gradients(resident(self.planned))
            return trace_step(
                self.model, lambda m: mean_loss(m, ids, ids, chunked=chunked), autocast_bf16=config.device == "cuda"
            )

    def update_bytes(self) -> int:
        """The most that a step of the optimizer has beyond weights, gradients and state; one stack after the other.

        Not of many processes, which share this work, nor of layer-wise updates, which are part of the backward pass.
        """
        if self.planned.processes.world > 1 or self.planned.config.optim.layerwise:
            return 0
        with self.mode:
            optimizer = optimizer_for(self.planned.config, self.model)
            self._gradients(True)
            return trace_update(self.model, optimizer).peak[OPTIMIZER]

    def _gradients(self, there: bool) -> None:
        for p in self.model.parameters():
            p.grad = torch.empty_like(p) if there and p.requires_grad else None

    def _documents(self) -> AbstractContextManager[None]:
        return nullcontext() if self.planned.config.data.document_mask else one_document()


def chunk(planned: Subject) -> int:
    """Tokens of a chunk of the loss on the device that is planned for."""
    return head_loss.CHUNK_TOKENS.get(str(planned.config.device), head_loss.CHUNK_TOKENS_OF_GPUS)


def full_chunks(planned: Subject) -> tuple[int, int]:
    """Two numbers of sequences, two and three chunks of the loss or more, from which memory is carried on to others."""
    fewest = max(1, chunk(planned) // planned.context)
    return 2 * fewest, 3 * fewest


def resident(planned: Subject) -> bool:
    """Whether gradients are counted beside a pass: they are there from the pass before, in shards, or go at once."""
    return planned.passes > 1 or planned.processes.world > 1 or planned.config.optim.layerwise


@contextmanager
def chunks_of(planned: Subject) -> Iterator[None]:
    """The loss in chunks as the planned device would have them."""
    before = dict(head_loss.CHUNK_TOKENS)
    head_loss.CHUNK_TOKENS["cpu"] = chunk(planned)
    try:
        yield
    finally:
        head_loss.CHUNK_TOKENS.update(before)


@contextmanager
def one_document() -> Iterator[None]:
    """Position ids without numbers are those of one document from its start."""
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


@contextmanager
def experts_at_once() -> Iterator[None]:
    """Dense experts as the operator that transformers has for old versions of PyTorch."""
    from transformers.integrations import moe

    before = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda input, weight, offs: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = before
