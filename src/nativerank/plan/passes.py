"""One pass and one update of a plan, run on tensors without numbers (`accounting.trace`), as one process trains.

Two answers are given that training reads off values: transformers asks the position ids whether a sequence holds
several documents, and without numbers would take it that it does, and build a mask (`one_document`); chunks of the loss
are those of the planned device (`chunks_of`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nativerank.accounting.trace import OPTIMIZER, Trace, trace_step, trace_update
from nativerank.distributed.grid import Grid
from nativerank.distributed.wrap import DTYPES
from nativerank.evaluate import head_loss
from nativerank.evaluate.loss import mean_loss
from nativerank.plan.subject import Subject
from nativerank.train.setup import optimizer_for, precisions


def trace(planned: Subject, depth: int | None, sequences: int) -> dict[str, Any]:
    """Bytes that wait for the backward pass, the most of each phase, and the operators.

    Args:
        planned: what is planned.
        depth: so many blocks; None is all.
        sequences: of the pass.
    """
    found = forward_and_backward(planned, depth, sequences)
    ops: dict[str, Any] = {}
    for op in found.ops:
        ops.setdefault(op.phase, {})[op.name] = {"calls": op.calls, "flops": op.flops, "bytes": op.bytes}
    return {"activations": found.held, "peak": found.peak, "ops": ops}


def forward_and_backward(planned: Subject, depth: int | None, sequences: int) -> Trace:
    """One pass; gradients are there before where `resident` says so."""
    model, _ = planned.build(depth)
    config, shape = planned.config, Grid(replicas=planned.processes.replicas, shards=planned.processes.shards)
    wide = DTYPES[precisions(config, shape)["precision"]]
    if shape.shards > 1 and wide is not None:
        model.to(wide)  # weights are gathered so; the shards are in `held`
    documents = nullcontext() if config.data.document_mask else one_document()
    with FakeTensorMode(allow_non_fake_inputs=True), chunks_of(planned), documents:
        model.to_empty(device="cpu")
        ids = torch.zeros(sequences, planned.context, dtype=torch.long)
        for p in model.parameters() if resident(planned) else ():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        chunked = config.train.loss != "whole"
        return trace_step(
            model, lambda m: mean_loss(m, ids, ids, chunked=chunked), autocast_bf16=config.device == "cuda"
        )


def update_bytes(planned: Subject, depth: int | None) -> int:
    """The most that one step of the optimizer has beyond weights, gradients and state; stacks go one after the other.

    Not of many processes, which share this work, nor of layer-wise updates, which are part of the backward pass.
    """
    if planned.processes.world > 1 or planned.config.optim.layerwise:
        return 0
    model, _ = planned.build(depth)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        optimizer = optimizer_for(planned.config, model)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        return trace_update(model, optimizer).peak[OPTIMIZER]


def chunk(planned: Subject) -> int:
    """Tokens of a chunk of the loss on the device that is planned for."""
    return head_loss.CHUNK_TOKENS.get(str(planned.config.device), head_loss.CHUNK_TOKENS_OF_GPUS)


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
