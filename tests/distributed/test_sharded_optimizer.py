"""The optimizer on several processes does what it does on one, and moves no more than it says."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from nativerank.distributed.grid import make_grid
from nativerank.distributed.pieces import full
from nativerank.methods import METHODS, build_optimizer, factorize

D_IN, WIDTH, D_OUT, STEPS = 12, 19, 16, 6  # 19 rows do not divide; d_in 12 and 16 do, 19 does not


def model_of(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(D_IN, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, D_OUT, bias=False)
    ).double()
    if METHODS[method].layer:
        factorize(model, method, rank=4)
    return model


def placement(p):
    """Rows of the tall matrix, where they divide."""
    if p.dim() == 2 and p.shape[1] > p.shape[0] and p.shape[1] % 4 == 0:
        return Shard(1)
    return Shard(0)


def wrapped(model, grid):
    if grid.shards == 1:
        return model
    mesh = grid.mesh["shard"] if grid.replicas == 1 else grid.mesh
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    return fully_shard(model, mesh=mesh, shard_placement_fn=placement)


def optimizer_of(model, method, options, **where):
    extra = {"guided_steps": 100, "stochastic_guide": False} if METHODS[method].guided else {}
    return build_optimizer(model, method, lr=0.05, aux_lr=0.01, **extra, **options, **where)


def batches():
    """Inputs and targets; with targets, so that no gradient is degenerate."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, D_IN + D_OUT, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def train(model, optimizer, grid=None):
    for batch in batches():
        part = batch if grid is None else batch.chunk(grid.world)[grid.rank]
        optimizer.zero_grad()
        x, y = part.split([D_IN, D_OUT], -1)
        (model(x) - y).square().mean().backward()
        if grid is not None and grid.shards == 1:
            for p in model.parameters():
                torch.distributed.all_reduce(p.grad, torch.distributed.ReduceOp.AVG)
        optimizer.step()


def weights(model):
    return {name: full(p).detach().clone() for name, p in model.named_parameters()}


def on_processes(rank, method, replicas, shards, algebra, options):
    grid = make_grid(replicas, shards, "cpu")
    model = wrapped(model_of(method), grid)
    optimizer = optimizer_of(model, method, options, grid=grid, algebra=algebra)
    train(model, optimizer, grid)
    names = {id(p): n for n, p in model.named_parameters()}
    state = {(p.name, p.start): (p.tensor.clone(), p.shape, p.along) for p in optimizer.pieces(names) if p.writes}
    return weights(model), state


def assembled(parts):
    """Whole state tensors from the pieces that processes write."""
    found = {}
    for part in parts:
        for (name, start), (tensor, shape, along) in part.items():
            whole = found.setdefault(name, torch.full(shape, torch.nan, dtype=tensor.dtype))
            place = whole if along is None else whole.narrow(along, start, tensor.shape[along])
            assert tensor.numel() == 0 or place.isnan().all(), f"{name} is written twice"
            place.copy_(tensor)
    return found


FORMS = [
    *((method, {}) for method in METHODS),
    ("spectron", {"certified": True, "weight_decay": 0.1}),
    ("spectron", {"norm": "exact", "orthogonalizer": "polar-express"}),
    ("lowrank-adamw", {"update_cap": 0.02}),
    ("sct", {"riemannian": True, "weight_decay": 0.1}),
    ("sct", {"preserve": True, "s_lr": None}),
    ("tsvd", {"weight_decay": 0.1}),
    ("stiefel-spectron", {"riemannian": True}),
]
QUICK = [(1, 2), (2, 2)]
GRIDS = [*QUICK, *(pytest.param(grid, marks=pytest.mark.slow) for grid in ((2, 1), (1, 4), (4, 1)))]


def named(grid):
    return "{}x{}".format(*grid)


@pytest.mark.parametrize("algebra", ["gram", "owner"])
@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize(("method", "options"), FORMS)
def test_several_processes_do_what_one_does(forked, method, options, grid, algebra):
    alone = model_of(method)
    optimizer = optimizer_of(alone, method, options)
    train(alone, optimizer)
    found = forked(on_processes, grid[0] * grid[1], method, *grid, algebra, options)
    for got, _ in found:
        for name, value in weights(alone).items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-9, msg=f"{method} {name}")
    names = {id(p): n for n, p in alone.named_parameters()}
    states = assembled([state for _, state in found])
    for piece in optimizer.pieces(names):
        torch.testing.assert_close(states.pop(piece.name), piece.tensor, rtol=0, atol=1e-8)
    assert not states


def written_from_outside(rank, algebra):
    """The weights after a step, half of them, and another step; and what state_dict says."""
    grid = make_grid(1, 2, "cpu")
    model = wrapped(model_of("spectron"), grid)
    optimizer = optimizer_of(model, "spectron", {}, algebra=algebra)  # the grid is that of the parameters
    train(model, optimizer, grid)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    optimizer.loaded()
    train(model, optimizer, grid)
    with pytest.raises(ValueError, match=r"optimizer\.pieces"):
        optimizer.state_dict()
    return weights(model)


@pytest.mark.parametrize("algebra", ["gram", "owner"])
def test_weights_that_others_wrote_are_taken_up(forked, algebra):
    alone = model_of("spectron")
    optimizer = optimizer_of(alone, "spectron", {})
    train(alone, optimizer)
    with torch.no_grad():
        for p in alone.parameters():
            p.mul_(0.5)
    train(alone, optimizer)
    for got in forked(written_from_outside, 2, algebra):
        for name, value in weights(alone).items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-9)
