"""PyTorch's engine around a model, by the grid.

    shards > 1              FSDP2 (`fully_shard`), one group of parameters per repeated block and one for the rest:
                            parameters become DTensors, gathered for the forward and for the backward pass of their
                            block, gradients averaged and scattered; with replicas > 1 (hsdp) averaged over these too
    shards = 1, replicas    DistributedDataParallel: whole parameters, averaged gradients
    one process             nothing

Activation checkpointing has to be on before, compilation of blocks comes after. The module that is returned computes
the training loss; parameters and names are looked up in the model itself. Only the first process needs the weights:
DistributedDataParallel sends them to the others, `deal` does where there are shards.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import bounds, cut_along, local

DTYPES: dict[str | None, torch.dtype | None] = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks: members of the outermost ModuleLists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def wrap(
    model: nn.Module,
    grid: Grid,
    dims: Mapping[int, int],
    *,
    reshard_after_forward: bool = True,
    precision: str | None = None,
    reduce: str | None = None,
    unused: bool = False,
) -> tuple[nn.Module, list[str]]:
    """Spreads a model over the grid.

    Args:
        model: whole, with the same weights on every process; on the grid's device, but for FSDP in host memory at will:
            then one block at a time passes through the device. Its parameters are replaced where it is sharded.
        grid: of the processes that exchange gradients.
        dims: {id(parameter): dimension to cut}; 0 for what is not named.
        reshard_after_forward: see ParallelConfig; so precision and reduce (None, "fp32" or "bf16").
        unused: some parameters take no part in some steps.

    Returns:
        The module to call forward on, and the names of parameters that are cut along dimension 0 against the wish in
        `dims`, since FSDP2 wants equal parts along any other one.
    """
    if grid.shards == 1:
        return (model if grid.replicas == 1 else _ddp(model, grid, reduce, unused)), []
    assert grid.mesh is not None
    placed = {id(p): _placement(p, dims, grid.shards) for p in model.parameters()}
    uneven = [n for n, p in model.named_parameters() if placed[id(p)].dim != dims.get(id(p), 0)]
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=DTYPES[reduce])
    common: dict[str, Any] = {
        "mesh": grid.mesh if grid.replicas > 1 else grid.mesh["shard"],
        "shard_placement_fn": lambda p: placed[id(p)],
        "mp_policy": policy,
    }
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=reshard_after_forward, **common)
    fully_shard(model, **common)  # its forward ends where its backward begins, so it stays gathered in between
    return model, uneven


def _placement(p: nn.Parameter, dims: Mapping[int, int], shards: int) -> Shard:
    dim = dims.get(id(p), 0)
    return Shard(dim if p.shape[dim] % shards == 0 else 0)


def _ddp(model: nn.Module, grid: Grid, reduce: str | None, unused: bool) -> DistributedDataParallel:
    on_cpu = next(model.parameters()).device.type == "cpu"
    wrapped = DistributedDataParallel(
        model,
        process_group=grid.along_replicas,
        forward_sync_buffers=False,  # rotary tables and the like never change
        find_unused_parameters=unused,
        # Where a gradient lies in its bucket changes after the first step, and with its alignment the last digit of
        # products on a CPU: a resumed run would differ.
        gradient_as_bucket_view=not on_cpu,
    )
    if reduce == "bf16":
        wrapped.register_comm_hook(grid.along_replicas, bf16_compress_hook)
    elif on_cpu and grid.replicas > 2:
        wrapped.register_comm_hook(grid.along_replicas, mean_in_order)
    return wrapped


def mean_in_order(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean of a bucket of gradients, every element of which is added up in the order of ranks.

    gloo's ring begins each stretch of a buffer with another rank, and DistributedDataParallel moves gradients within
    its buckets once it has seen a step, so a resumed run would differ from an uninterrupted one in the last digit. As
    many bytes as the ring.
    """
    gradients, world = bucket.buffer(), group.size()
    sent = torch.nn.functional.pad(gradients, (0, -gradients.numel() % world))
    parts = torch.empty_like(sent)
    dist.all_to_all_single(parts, sent, group=group)
    first, *others = parts.chunk(world)
    for part in others:
        first += part
    dist.all_gather_single(sent, first.div_(world), group=group)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradients.copy_(sent[: gradients.numel()]))
    return done


@torch.no_grad()
def deal(model: nn.Module, weights: dict[str, Tensor], grid: Grid) -> None:
    """Fills the shards of a wrapped model from whole weights of the grid's first process, one after the other.

    Args:
        weights: by parameter name, anywhere in the first process's memory; it is emptied on the way. Nothing elsewhere.
    """
    for name, parameter in model.named_parameters():
        part, along = local(parameter), cut_along(parameter)
        assert along is not None
        whole = torch.empty(parameter.shape, dtype=part.dtype, device=part.device)
        if grid.rank == 0:
            whole.copy_(weights.pop(name))
        dist.broadcast(whole, group=grid.everyone, group_src=0)
        part.copy_(whole.narrow(along, *bounds(parameter.shape[along], grid.shards, grid.shard)))
    for buffer in model.buffers():  # whole everywhere
        dist.broadcast(buffer, group=grid.everyone, group_src=0)


def gradient_sync(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """For the forward and backward pass of one micro-batch: replicas exchange gradients in that of the last one only.

    Shards add up their part in every pass: whole gradients that wait for the last one would take as much memory as
    without shards.

    Args:
        module: from `wrap`.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(last)
        module.set_is_last_backward(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Lets go of gathered weights after a forward pass without a backward pass: `parameters()` are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode for the block; sharded weights that it gathered are shards again after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        reshard(model)


def original_class(model: nn.Module) -> type:
    """The class that a model had before it was sharded."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
