"""Parameters of other shapes inside a model that is wrapped for many processes.

    loosened = loosen(model, names)   FSDP2: each parameter leaves its communication group, and a plain parameter of the
                                      whole shape on the meta device takes its place; its shard lives on in `loosened`
    ...                               ordinary surgery on plain parameters: another shape, another one, none
    tighten(model, place)             whatever is plain joins the group of the module around it, sharded and zero

Nothing else is touched: the other parameters stay the same objects with the same shards, no tensor is ever whole and
nothing is sent. FSDP2 has no public way to this: `fully_shard` can be neither undone nor applied again, and its methods
(reshard, unshard, set_*) leave the set of parameters alone. Its groups do make and drop their parameters (`FSDPParam`)
one by one, which is what is used here, and in this file only (PyTorch 2.13; test_rewrap.py names what it takes).
Without FSDP2 the same two calls exchange plain parameters; a `DistributedDataParallel` around them, which hooks onto
every one of them, is let go (`let_go`) and built anew.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup, _get_param_module_infos
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from nativerank.distributed.wrap import reshard

Place = Callable[[nn.Parameter], Shard | None]  # of a plain parameter; None: along dimension 0


def loosen(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Puts plain parameters without numbers in the place of these; gives back what was there, by name.

    Args:
        model: wrapped or not, between two steps.
        names: as in `model.named_parameters()`; of a tied one the first.
    """
    reshard(model)
    found, managed = {}, {}
    for group in groups_of(model):
        for member in group.fsdp_params:
            managed[id(member.sharded_param)] = group, member
    for name in names:
        parameter = found[name] = model.get_parameter(name)
        plain = nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=parameter.requires_grad
        )
        if id(parameter) in managed:
            group, member = managed[id(parameter)]
            member._post_load_hook_handle.remove()
            member._setattr_on_modules(plain)
            group.fsdp_params.remove(member)
        else:
            replace(model, parameter, plain)
    return found


def tighten(model: nn.Module, place: Place, device: torch.device) -> None:
    """Gives every parameter without numbers its place in the wrapping, and zeros on this device.

    Args:
        model: of which some parameters are plain and on the meta device.
        place: which dimension of them is sharded.
        device: of the model, where it is not wrapped.
    """
    for module in reversed(list(model.modules())):  # the innermost wrapped module claims first, as with fully_shard
        group = group_of(module)
        new = [] if group is None else [p for p in module.parameters() if p.is_meta]
        if group is not None and new:
            for parameter, info in zip(new, _get_param_module_infos(new, group.modules), strict=True):
                group.fsdp_params.append(_member(group, parameter, info, place))
            order = {id(p): i for i, p in enumerate(module.parameters())}
            group.fsdp_params.sort(key=lambda member: order[id(member.sharded_param)])
    for parameter in [p for p in model.parameters() if p.is_meta]:
        zeros = torch.zeros_like(parameter, device=device)
        replace(model, parameter, nn.Parameter(zeros, requires_grad=parameter.requires_grad))


def _member(group: FSDPParamGroup, parameter: nn.Parameter, info: Any, place: Place) -> FSDPParam:
    """A parameter of the group: what its constructor leaves on the meta device, filled as `load_state_dict` would."""
    member = FSDPParam(
        parameter,
        info,
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        place,
        group.mp_policy,
        group.offload_policy,
    )
    zeros = torch.zeros(member.sharded_size, dtype=parameter.dtype, device=group.device)
    sharded = nn.Parameter(member.to_sharded_dtensor(zeros), requires_grad=parameter.requires_grad)
    member._setattr_on_modules(sharded)
    member.reset_sharded_param()
    member.init_dtype_attrs(group.mp_policy)
    return member


def replace(model: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    """Puts a parameter in the place of another one wherever that is registered."""
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is old:
                module._parameters[key] = new


def groups_of(model: nn.Module) -> Iterator[FSDPParamGroup]:
    """The communication groups of a model; none if it is not wrapped by FSDP2."""
    return (group for module in model.modules() if (group := group_of(module)) is not None)


def group_of(module: nn.Module) -> FSDPParamGroup | None:
    """The communication group that FSDP2 made for this very module."""
    if not isinstance(module, FSDPModule):
        return None
    group: FSDPParamGroup | None = module._get_fsdp_state()._fsdp_param_group
    return group


def let_go(wrapped: nn.Module) -> None:
    """Takes the hooks of a `DistributedDataParallel`, if that is what it is, off the parameters inside."""
    if isinstance(wrapped, DistributedDataParallel):
        wrapped._remove_autograd_hooks()
