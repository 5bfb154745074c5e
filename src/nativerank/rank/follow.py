"""Loading a checkpoint whose factors have other ranks, or guides that this model has not or no longer has.

    NAME.up.weight (d_out, r), NAME.down.weight (r, d_in)    the layer is brought to rank r, the optimizer's state too
    NAME.guide                                               guides come back, or leave where a checkpoint has none

A hook on the model's `load_state_dict` sees the tensors before they are read, so other people's trainers resume a run
whose ranks have changed, or whose guides have left, without knowing of either. No tensor is copied by it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nativerank.layers import guided_layers
from nativerank.layers.base import factor_layers
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.reshape import reshape
from nativerank.optim.roles import members_of

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]  # torch.Size is one


def follow_checkpoints(model: nn.Module, optimizer: LowRankOptimizer | None = None) -> RemovableHandle:
    """From now on the model takes up the shapes of what is loaded into it.

    Args:
        model: factorized; it may be loaded as part of another module, or shard by shard.
        optimizer: of the model, on one process; its state follows. None where there is none yet: one that is built
            after loading finds the new shapes.

    Returns:
        A handle; its `remove()` ends this.
    """

    def follow(_: nn.Module, state_dict: Tensors, prefix: str, *rest: Any) -> None:
        shapes = {name: tensor.shape for name, tensor in state_dict.items() if isinstance(tensor, Tensor)}
        _take_ranks(model, optimizer, shapes, prefix)
        _take_guides(model, optimizer, shapes, prefix)

    return model.register_load_state_dict_pre_hook(follow)


def _take_ranks(model: nn.Module, optimizer: LowRankOptimizer | None, stored: Shapes, prefix: str) -> None:
    for name, layer in factor_layers(model).items():
        rank = stored_rank(stored, f"{prefix}{name}")
        if rank in (None, layer.rank):
            continue
        if optimizer is not None and members_of(layer)[0].requires_grad:
            reshape(optimizer, model, [(layer, rank)])
        else:
            layer.reshape(rank)


def stored_rank(shapes: Shapes, name: str) -> int | None:
    """The rank of a factor layer among the shapes of tensors; None if neither of its factors is there."""
    for side, axis in (("up", -1), ("down", -2)):
        for key in (f"{name}.{side}.weight", f"{name}.{side}"):  # the latter in stacks of experts
            if key in shapes:
                return shapes[key][axis]
    return None


def _take_guides(model: nn.Module, optimizer: LowRankOptimizer | None, stored: Shapes, prefix: str) -> None:
    layers = guided_layers(model)
    here = any(layer.guide is not None for layer in layers.values())
    there = any(f"{prefix}{name}.guide" in stored for name in layers)
    if here == there or not (there or all(stored_rank(stored, f"{prefix}{name}") for name in layers)):
        return  # one shard of many says nothing by what it lacks
    if optimizer is not None and optimizer.guides is not None:
        optimizer.guides.set(0 if there else optimizer.guides.guided_steps)  # the step itself is in its state_dict
        return
    for layer in layers.values():
        if there:
            layer.allocate_guide()
        else:
            layer.free_guide()
