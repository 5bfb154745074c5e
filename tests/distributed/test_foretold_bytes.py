"""What accounting foretells is what every process sends in a real step, byte by byte, and what it keeps."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from nativerank.accounting.traffic import exchanged_bytes, held_state_bytes, optimizer_scale, phase_bytes, state_bytes
from nativerank.bench.sent import Sent
from nativerank.config import ParallelConfig, RunConfig
from nativerank.distributed.grid import make_grid
from nativerank.methods import build_optimizer, factorize, find_method
from nativerank.train.setup import spread

D = 24
GRIDS = [(1, 2), (2, 1), (1, 4), (2, 2)]
METHODS = ("spectron", "sct", "tsvd", "stiefel-spectron", "adam-muon", "lowrank-muon", "dense-muon")
CASES = [(method, algebra) for method in METHODS for algebra in ("gram", "owner")]


class Blocks(nn.Module):
    """Repeated blocks and a head, as the wrapping finds them; heights that 4 processes cannot share evenly."""

    def __init__(self):
        super().__init__()
        sizes = (D, 32, 22, D)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.norm(x)


def steps(rank, replicas, shards, cases, dtype=torch.float64, reshard=True):
    """Bytes counted and foretold in each case."""
    grid = make_grid(replicas, shards, "cpu")
    return [step(grid, *case, dtype, reshard) for case in cases]


def step(grid, method, algebra, dtype, reshard):
    """Bytes of the gradients' exchange, of the optimizer's, and of what is kept."""
    torch.manual_seed(0)
    model = Blocks().to(dtype)
    if find_method(method).layer:
        factorize(model, method, rank=6)
    config = RunConfig(method=method, parallel=ParallelConfig(reshard_after_forward=reshard))
    forward, _ = spread(config, model, grid)
    optimizer = build_optimizer(model, method, grid=grid, algebra=algebra)
    for _ in range(3):  # the first step also tells owners the weights, the second orders DDP's buckets
        optimizer.zero_grad()
        with Sent("gradients") as traffic:
            forward(torch.randn(4, D, dtype=dtype)).square().sum().backward()
            traffic.phase = "optimizer"
            optimizer.step()
    layout = optimizer.layout
    foretold = sum(
        part[grid.replica, grid.shard].item() for part in phase_bytes(layout.units, layout.groups, grid).values()
    )
    gradients = exchanged_bytes(model, grid, reshard, None, None)["total"]
    tensors = 40 * len(layout.units) * grid.world  # more than travel
    return {
        "gradients": (traffic.bytes["gradients"], gradients),
        "optimizer": (traffic.bytes["optimizer"], foretold, tensors),
        "state": (held_state_bytes(optimizer), state_bytes(layout.groups, layout.units, grid)[grid.rank].item()),
        "algebra": {unit.algebra for unit in layout.units},
        "largest": optimizer_scale(optimizer.param_groups, grid, algebra)["largest_bytes"],
    }


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "{}x{}".format(*grid))
def test_every_process_sends_and_keeps_what_was_foretold(forked, grid):
    for case, found in zip(CASES, zip(*forked(steps, grid[0] * grid[1], *grid, CASES), strict=True), strict=True):
        for rank in found:
            counted, foretold = rank["gradients"]
            assert counted == foretold, case
            counted, foretold, _ = rank["optimizer"]  # numbers of 8 bytes need no padding
            assert counted == pytest.approx(foretold, abs=1e-6), case
            assert rank["state"][0] == rank["state"][1], case
            assert case[1] in rank["algebra"], "22 rows make no 4 equal parts: their owner's"
        assert max(rank["optimizer"][0] for rank in found) == pytest.approx(found[0]["largest"]), case


def test_padding_is_at_most_8_bytes_a_tensor(forked):
    found = [rank["optimizer"] for (rank,) in forked(steps, 4, 1, 4, [("spectron", "gram")], torch.float32)]
    assert all(foretold <= counted < foretold + 8 * tensors for counted, foretold, tensors in found)


def test_weights_that_stay_gathered_are_gathered_once(forked):
    again, once = (
        [rank["gradients"] for (rank,) in forked(steps, 2, 1, 2, CASES[:1], torch.float32, reshard)]
        for reshard in (True, False)
    )
    assert all(counted == foretold for counted, foretold in again + once)
    assert once[0][0] < again[0][0]
