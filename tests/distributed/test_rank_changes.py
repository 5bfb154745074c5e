"""Ranks that change and guides that end on several processes: what one process does, and nothing stays behind."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nativerank.config import AdaptConfig
from nativerank.distributed.grid import SINGLE, make_grid
from nativerank.distributed.pieces import full
from nativerank.distributed.wrap import wrap
from nativerank.layers.experts import LowRankExperts
from nativerank.methods import METHODS, build_optimizer, factorize
from nativerank.optim.roles import assign_roles, long_sides
from nativerank.rank.controller import RankController

D_IN, WIDTH, D_OUT, STEPS = 12, 19, 16, 9  # 19 rows do not divide, nor do 19 columns
LOOKS = AdaptConfig(
    mode="schedule", threshold=0.9, start=0.3, every=0.2, until=1.0, hysteresis=0.0, grow=0.5, multiple=1, min=1
)


class Net(nn.Module):
    """Blocks, as `wrap` looks for, around a head that is not one."""

    def __init__(self):
        super().__init__()
        sizes = [(D_IN, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, D_OUT)]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in sizes)
        self.norm = nn.LayerNorm(D_OUT)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ExpertBlock(nn.Module):
    """A token goes to the first or to the third of three experts."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.experts = LowRankExperts(3, d_in, d_out, 8)

    def forward(self, x):
        third = x[:, 0] > 0
        order, first = third.int().argsort(stable=True), int((~third).sum())
        y = self.experts(x[order], torch.tensor([first, first, len(x)], dtype=torch.int32))
        return torch.tanh(y[order.argsort()])


class ExpertNet(Net):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(ExpertBlock(a, b) for a, b in [(D_IN, D_IN), (D_IN, WIDTH), (WIDTH, D_OUT)])


class Run:
    """A model, its wrapping, its optimizer and its ranks, on one process or several."""

    def __init__(self, method, grid=SINGLE, algebra="auto", net=Net):
        torch.manual_seed(0)
        self.grid, self.model = grid, net().double()
        self.target = torch.randn(D_IN, 3, dtype=torch.float64) @ torch.randn(3, D_OUT, dtype=torch.float64)
        if net is Net:
            factorize(self.model, method, rank=8)
        self.wrap()
        self.optimizer = build_optimizer(self.model, method, lr=0.05, aux_lr=0.01, grid=grid, algebra=algebra)
        self.optimizer.replaced = self.wrap if isinstance(self.wrapped, DistributedDataParallel) else None
        self.ranks = RankController(self.model, self.optimizer, LOOKS, STEPS)
        self.losses, self.changes = [], []

    def wrap(self):
        if isinstance(getattr(self, "wrapped", None), DistributedDataParallel):
            self.wrapped._remove_autograd_hooks()
        dims = long_sides(assign_roles(self.model))
        self.wrapped, _ = wrap(self.model, self.grid, dims)

    def step(self, step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, D_IN, generator=generator, dtype=torch.float64)
        x = x.chunk(self.grid.world)[self.grid.rank]
        self.optimizer.zero_grad()
        loss = (self.wrapped(x) - x @ self.target).square().mean()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())
        if self.ranks.due(step + 1) and (change := self.ranks.look(step + 1)) is not None:
            self.changes.append((step + 1, change.ranks, change.energy))

    def train(self, first=0, last=STEPS):
        for step in range(first, last):
            self.step(step)
        return self

    def weights(self):
        return {name: full(p).detach().clone() for name, p in self.model.named_parameters()}

    def state(self):
        names = {id(p): name for name, p in self.model.named_parameters()}
        pieces = [p for p in self.optimizer.pieces(names) if p.writes]
        return {(p.name, p.start): (p.tensor.clone(), p.shape, p.along) for p in pieces}

    def mean_losses(self):
        losses = torch.stack(self.losses)
        if self.grid.world > 1:
            torch.distributed.all_reduce(losses)
        return losses / self.grid.world


def assembled(parts):
    found = {}
    for part in parts:
        for (name, start), (tensor, shape, along) in part.items():
            whole = found.setdefault(name, torch.full(shape, torch.nan, dtype=tensor.dtype))
            (whole if along is None else whole.narrow(along, start, tensor.shape[along])).copy_(tensor)
    return found


def on_processes(rank, method, replicas, shards, algebra, net=Net):
    run = Run(method, make_grid(replicas, shards, "cpu"), algebra, net).train()
    return run.weights(), run.state(), run.mean_losses(), run.changes, run.ranks.state()


METHODS_WITH_RANKS = [name for name, row in METHODS.items() if row.layer and not row.guided]
GRIDS = [(2, 1), (1, 2), (2, 2), (1, 4)]
QUICK = {
    *(("spectron", grid, algebra) for grid in ((2, 1), (1, 2)) for algebra in ("gram", "owner")),
    *((method, (1, 2), "gram") for method in ("tsvd", "stiefel-spectron")),
    ("lowrank-adamw", (1, 2), "auto"),
}


def cases():
    for case in itertools.product(METHODS_WITH_RANKS, GRIDS, ("gram", "owner", "auto")):
        yield pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "grid", "algebra"), list(cases()), ids=lambda x: "{}x{}".format(*x) if type(x) is tuple else x
)
def test_ranks_change_as_on_one_process(forked, method, grid, algebra):
    as_on_one_process(Run(method).train(), forked(on_processes, grid[0] * grid[1], method, *grid, algebra))


@pytest.mark.parametrize("grid", [(1, 2), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_ranks_of_experts_change_too(forked, grid):
    alone = Run("spectron", net=ExpertNet).train()
    as_on_one_process(alone, forked(on_processes, grid[0] * grid[1], "spectron", *grid, "auto", ExpertNet))


def as_on_one_process(alone, found):
    assert len(alone.changes) > 1, "the test looks at nothing"
    assert len({after for _, ranks, _ in alone.changes for _, after in ranks.values()}) > 1
    for weights, _, losses, changes, ranks in found:
        assert [(step, change) for step, change, _ in changes] == [(step, change) for step, change, _ in alone.changes]
        assert ranks == alone.ranks.state()
        torch.testing.assert_close(losses, alone.mean_losses(), rtol=0, atol=1e-9)
        for name, value in alone.weights().items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-7, msg=f"{name}: {{}}".format)
    states, wanted = assembled(state for _, state, *_ in found), assembled([alone.state()])
    assert states.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(states[name], value, rtol=0, atol=1e-6, msg=f"{name}: {{}}".format)
