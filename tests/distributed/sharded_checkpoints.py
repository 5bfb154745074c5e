"""Models on a grid and the whole tensors of their checkpoints: what tests of sharded checkpoints share."""

import time

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from nativerank.distributed.grid import SINGLE, make_grid
from nativerank.distributed.pieces import Piece
from nativerank.layers import matrix_parameters
from nativerank.methods import METHODS, build_optimizer, factorize
from nativerank.optim.roles import assign_roles, long_sides
from nativerank.train import checkpoint
from nativerank.train.piece_files import Stored
from nativerank.train.saver import Saver

STATE = dict.fromkeys(checkpoint.STATE_KEYS, 0) | {"step": 1}


def model_of(method, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 19), nn.Tanh(), nn.Linear(19, 16), nn.Linear(16, 4))  # 19 does not divide
    if METHODS[method].layer:
        factorize(model, method, rank=3)
    return model


def built(method, grid, algebra="auto", seed=0, dtype="fp32"):
    """A model on its grid, and its optimizer."""
    model = model_of(method, seed)
    if grid.shards > 1:
        dims = long_sides(assign_roles(model, () if METHODS[method].layer else matrix_parameters(model)))
        placed = {id(p): dims.get(id(p), 0) for p in model.parameters()}
        placed = {id(p): Shard(d if p.shape[d := placed[id(p)]] % grid.shards == 0 else 0) for p in model.parameters()}
        fully_shard(
            model,
            mesh=grid.mesh["shard"] if grid.replicas == 1 else grid.mesh,
            shard_placement_fn=lambda p: placed[id(p)],
        )
    guided = {"guided_steps": 9, "stochastic_guide": False} if METHODS[method].guided else {}
    optimizer = build_optimizer(
        model, method, lr=0.05, aux_lr=0.01, grid=grid, algebra=algebra, state_dtype=dtype, **guided
    )
    return model, optimizer


def trained(model, optimizer, grid=SINGLE, steps=2):
    torch.manual_seed(7)
    for x in torch.randn(steps, 8, 12):
        optimizer.zero_grad()
        model(x.chunk(grid.world)[grid.rank]).square().mean().backward()
        if grid.world > 1 and grid.shards == 1:
            for p in model.parameters():
                dist.all_reduce(p.grad, dist.ReduceOp.AVG)
        optimizer.step()


def grid_of(replicas, shards):
    return make_grid(replicas, shards, "cpu") if replicas * shards > 1 else SINGLE


def stored(folder):
    """Every whole tensor of a checkpoint, generators left out."""
    found = {}
    for kind in checkpoint.KINDS:
        tensors = Stored(sorted(folder.glob(f"{kind}*")))
        wholes = []
        for name, shape in tensors.shapes.items():
            if not name.startswith("rng/"):
                file = tensors._parts[name][0].file
                dtype = load_file(file)[name].dtype
                wholes.append(Piece(name, torch.empty(shape, dtype=dtype), shape))
        tensors.fill(wholes)
        found |= {f"{kind} {p.name}": p.tensor for p in wholes}
    return found


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
    return True


def save_on(rank, replicas, shards, target, background=False, method="spectron", steps=1):
    """`steps` saves, each of other weights."""
    grid = grid_of(replicas, shards)
    model, optimizer = built(method, grid)
    trained(model, optimizer, grid)
    torch.manual_seed(100 + rank)
    saver = Saver(target, grid, background)
    for step in range(1, steps + 1):
        fill_with(model, step)
        saver.save(step, checkpoint.contents(model, optimizer, grid), STATE | {"step": step})
        fill_with(model, -1)  # what comes later does not change it
    saver.wait()
    saver.close()
    return torch.rand(3)


def fill_with(model, value):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def slowly(delay):
    """The writer of pieces, which takes its time before and after."""
    original = checkpoint.write_pieces

    def write(pieces, file):
        time.sleep(delay)
        original(pieces, file)
        time.sleep(delay)

    return write
