"""Parameters that change shape, come or go while many processes hold pieces of them and of their optimizer state.

    with reshaped(optimizer, model, names):   inside, these parameters are plain and have no numbers
        ...                                   any surgery on layers, `optimizer.release`, `optimizer.adopt`
    afterwards they are shards again, zero, in model and optimizer, which stay the same objects

    resize(optimizer, model, changes)         factors at another rank, with their numbers and their state: of each round
                                              every process puts one matrix together, does what one process alone does
                                              (`layer.resize`, `resized_state`) and deals the result out

All decisions are the caller's and the same on every process. Who owns which matrix follows from the shapes alone
(`optim.units`), so it may change for matrices that did not: their state is moved too.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from nativerank.distributed.move import Holding, Relocation, Whole, held, move
from nativerank.distributed.pieces import cut_along, piece_of
from nativerank.distributed.rewrap import loosen, tighten
from nativerank.distributed.wrap import reshard
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.resize import resized_state
from nativerank.optim.roles import members_of

Resize = tuple[Any, int, torch.Generator | None]  # a factor layer, its new rank, the generator of new columns


@contextmanager
def reshaped(
    optimizer: LowRankOptimizer, model: nn.Module, names: Collection[str] = (), units: Sequence[Relocation] = ()
) -> Iterator[None]:
    """Surgery on a model whose parameters many processes hold; on one process nothing but the surgery.

    Args:
        names: of parameters that are replaced, or freed, in the block.
        units: of these, how those that keep their names get their numbers; others are zero.

    What did not change keeps weights and state, wherever they are afterwards.
    """
    grid = optimizer.layout.grid
    if grid.world == 1:
        yield
        return
    reshard(model)
    device = next(model.parameters()).device
    lost = [name for name in names if not any(unit.has(name) for unit in units)]
    before = _held(optimizer, model, names, lost)
    old = loosen(model, names)
    yield
    plain = {name: p for name, p in model.named_parameters() if p.is_meta}
    along = {id(plain[name]): cut_along(p) for name, p in old.items() if name in plain}
    tighten(model, lambda p: Shard(along.get(id(p), _long_side(p, grid.shards)) or 0), device)
    now = dict(model.named_parameters())
    optimizer.relayout({p: now[name] for those in (old, plain) for name, p in those.items() if name in now})
    move(units, before, _held(optimizer, model, [name for name in names if name in now]), grid, device)
    optimizer.loaded()
    if optimizer.replaced is not None:
        optimizer.replaced()


def resize(optimizer: LowRankOptimizer, model: nn.Module, changes: Sequence[Resize]) -> None:
    """Gives factor layers other ranks, and their optimizer state with them."""
    if optimizer.layout.grid.world == 1:
        for layer, rank, generator in changes:
            optimizer.resize(layer.resize(rank, generator))
        return
    reshard(model)
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[tuple[str, ...], Relocation] = {}
    for layer, rank, generator in changes:
        members = tuple(names[id(p)] for p in members_of(layer))
        found.setdefault(members, Relocation(members, partial(_resized, layer, rank, generator, members)))
    with reshaped(optimizer, model, [name for members in found for name in members], list(found.values())):
        for layer, rank, _ in changes:
            layer.reshape(rank)


def reshape(optimizer: LowRankOptimizer, model: nn.Module, ranks: Sequence[tuple[Any, int]]) -> None:
    """Gives factor layers other ranks, for numbers that are loaded next."""
    if optimizer.layout.grid.world == 1:
        for layer, rank in ranks:
            optimizer.resize(layer.reshape(rank))
        return
    reshard(model)
    names = {id(p): name for name, p in model.named_parameters()}
    changed = [layer for layer, rank in ranks if layer.rank != rank]
    if not changed:
        return
    with reshaped(optimizer, model, dict.fromkeys(names[id(p)] for layer in changed for p in members_of(layer))):
        for layer, rank in ranks:
            layer.reshape(rank)


def _resized(layer: Any, rank: int, generator: torch.Generator | None, members: Sequence[str], whole: Whole) -> Whole:
    """The tensors of a layer at another rank."""
    weights = {name: nn.Parameter(whole[name]) for name in members}
    with _standing_in({id(p): weights[name] for p, name in zip(members_of(layer), members, strict=True)}, layer):
        changes = {id(change.parameter): change for change in layer.resize(rank, generator)}
    made = dict(whole)
    for name, weight in weights.items():
        state = {key.rpartition("/")[2]: value for key, value in whole.items() if key.rpartition("/")[0] == name}
        if (change := changes.get(id(weight))) is not None:
            state = resized_state(state, change)
        made |= {name: weight.detach()} | {f"{name}/{key}": value for key, value in state.items()}
    return made


@contextmanager
def _standing_in(others: Mapping[int, nn.Parameter], layer: nn.Module) -> Iterator[None]:
    """Other parameters in the place of a layer's, by their ids, for the time of the block."""
    places = [
        (module._parameters, key, p)
        for module in layer.modules()
        for key, p in module._parameters.items()
        if id(p) in others
    ]
    for parameters, key, p in places:
        parameters[key] = others[id(p)]
    yield
    for parameters, key, p in places:
        parameters[key] = p


def _held(optimizer: LowRankOptimizer, model: nn.Module, names: Collection[str], lost: Collection[str] = ()) -> Holding:
    """The named parameters and all optimizer state, but of those that are lost."""
    grid, parameters = optimizer.layout.grid, dict(model.named_parameters())
    state = optimizer.pieces({id(p): name for name, p in parameters.items()})
    kept = [piece for piece in state if piece.name.rpartition("/")[0] not in lost]
    return held([*(piece_of(name, parameters[name], grid) for name in names if name not in lost), *kept], grid)


def _long_side(p: Tensor, shards: int) -> int:
    """The dimension that a new dense matrix is cut along, as `roles.long_sides` has it where parts are equal."""
    return int(p.dim() == 2 and p.shape[1] > p.shape[0] and p.shape[1] % shards == 0)
