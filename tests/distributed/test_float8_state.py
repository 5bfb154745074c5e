"""Moments in 8 bits on row shards: what one process holds, cut; another number of processes takes them over."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from nativerank.accounting.traffic import held_state_bytes, state_bytes
from nativerank.distributed.grid import SINGLE, make_grid
from nativerank.distributed.pieces import full
from nativerank.methods import build_optimizer, factorize
from nativerank.train import checkpoint

TOKENS, WIDTH = 151, 264  # rows that do not divide, and a row is a block and a bit
STATE = dict.fromkeys(checkpoint.STATE_KEYS, 0) | {"step": 1}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, 32)
        self.head = nn.Linear(32, TOKENS)

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embed(ids))))


def built(grid):
    model = Net()
    factorize(model, "spectron", rank=8, exclude=["head"])
    if grid.world > 1:
        fully_shard(model, mesh=grid.mesh["shard"])
    return model, build_optimizer(model, "spectron", lr=0.05, aux_lr=0.01, grid=grid, aux_state_dtype="fp8")


def trained(model, optimizer, grid, steps):
    torch.manual_seed(7)
    losses = []
    for ids in torch.randint(TOKENS, (steps, 64)):
        optimizer.zero_grad()
        mine = ids.chunk(grid.world)[grid.rank]
        loss = nn.functional.cross_entropy(model(mine), (3 * mine + 1) % TOKENS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def grid_of(world):
    return make_grid(1, world, "cpu") if world > 1 else SINGLE


def on_a_grid(rank, world, steps):
    grid = grid_of(world)
    model, optimizer = built(grid)
    assert held_state_bytes(optimizer) == state_bytes(optimizer.param_groups, optimizer.layout.units, grid)[rank]
    losses = trained(model, optimizer, grid, steps)
    return losses, {name: full(p.detach()) for name, p in model.named_parameters()}


def test_two_processes_train_as_one(forked):
    """Gradients differ in their last digits, so a code here and there; noise is that of an element's place."""
    losses, weights = on_a_grid(0, 1, 20)
    for_two = forked(on_a_grid, 2, 2, 20)
    together = [sum(each) / 2 for each in zip(*(found[0] for found in for_two), strict=True)]
    assert losses[-1] < 0.9 * losses[0] and together == pytest.approx(losses, abs=1e-4)
    for name, weight in for_two[0][1].items():
        assert (weight - weights[name]).abs().max() < 0.01 and (weight - weights[name]).abs().mean() < 1e-5, name


def taken_on(rank, world, source, target, steps):
    """Loads, goes on for a while, saves."""
    grid = grid_of(world)
    model, optimizer = built(grid)
    if source is not None:
        checkpoint.check(source, grid)
        checkpoint.load(source, model, checkpoint.contents(model, optimizer, grid), grid)
        optimizer.loaded()
    trained(model, optimizer, grid, steps)
    checkpoint.save(target, 1, checkpoint.contents(model, optimizer, grid), STATE, grid)
    pieces = checkpoint.contents(model, optimizer, grid)["optimizer"]
    return {p.name: (p.start, p.tensor) for p in pieces if p.name.startswith("embed")}


def test_codes_and_scales_go_from_one_to_three_to_two_processes_bit_for_bit(forked, tmp_path):
    folders = [tmp_path / name / "checkpoints/step-000001" for name in ("one", "three", "two")]
    whole = taken_on(0, 1, None, tmp_path / "one", 3)
    assert {name.rpartition("/")[2] for name in whole} == {
        *("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "step")
    }
    assert whole["embed.weight/exp_avg_scale"][1].shape == (TOKENS, 2)
    for world, source, target in ((3, folders[0], "three"), (2, folders[1], "two")):
        for parts in forked(taken_on, world, world, source, tmp_path / target, 0):
            for name, (start, part) in parts.items():
                expected = whole[name][1]
                assert torch.equal(part, expected[start : start + len(part)] if part.dim() else expected), name
