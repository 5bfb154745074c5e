"""What a step of the optimizer sends: how many collectives, how large, and who solves what."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from nativerank.distributed.grid import make_grid
from nativerank.distributed.pieces import local
from nativerank.methods import METHODS, build_optimizer, factorize
from nativerank.optim.traffic import sent_bytes
from nativerank.optim.units import GRAM

D, RANK, LAYERS = 512, 4, 8


def cases(methods, grids, quick):
    """Every method on every grid; all but the quick methods on the first one alone, unless there is time."""
    found = []
    for method in methods:
        for grid in grids:
            slow = [pytest.mark.slow] if grid != grids[0] and method not in quick else []
            found.append(pytest.param(method, grid, marks=slow, id="{}-{}x{}".format(method, *grid)))
    return found


LOW_RANK = [name for name, row in METHODS.items() if row.layer in ("lowrank", "spectral") and row.rule != "adamw"]


class Traffic(TorchDispatchMode):
    """Bytes that this process hands to each collective, its part for itself left out of an all-to-all."""

    def __init__(self, rank, world):
        super().__init__()
        self.rank, self.world, self.calls = rank, world, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "alltoall_base" in str(function):
            _, source, _, _, sizes = args[:5]
            own = sizes[self.rank] if sizes else source.nbytes // self.world
            self.calls.append(("all_to_all", source.nbytes - own))
        elif function.namespace == "c10d":
            self.calls.append((str(function).split(".")[1], sum(t.nbytes for t in args[0])))
        return function(*args, **(kwargs or {}))


class Solved(TorchDispatchMode):
    """How many matrices a process puts through eigenvalue and Cholesky routines, and square products of that size."""

    def __init__(self):
        super().__init__()
        self.matrices = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in ("eigh", "cholesky", "baddbmm", "svd")):
            self.matrices += args[0].shape[:-2].numel()
        return function(*args, **(kwargs or {}))


def model_of(method, grid):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(LAYERS)))
    if METHODS[method].layer:
        factorize(model, method, rank=RANK)
    if grid.shards > 1:
        mesh = grid.mesh["shard"] if grid.replicas == 1 else grid.mesh
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(int(p.shape[-1] == D and p.shape[0] != D)))
    return model


def step(rank, method, replicas, shards, algebra, options):
    """(calls, collectives, local bytes of the matrices, matrices solved, bytes foretold of all processes,
    algebras)."""
    grid = make_grid(replicas, shards, "cpu")
    model = model_of(method, grid)
    optimizer = build_optimizer(model, method, grid=grid, algebra=algebra, **options)
    for _ in range(2):  # the first one fetches what owners need only once
        optimizer.zero_grad()
        model(torch.randn(4, D)).square().sum().backward()
        with CommDebugMode() as collectives, Traffic(grid.rank, grid.world) as traffic, Solved() as solved:
            optimizer.step()
    units, group = optimizer.layout.units, optimizer.param_groups[0]
    held = sum(local(p.detach()).nbytes for u in units for p in u.members)
    predicted = sum(sent_bytes(u, group, grid, u.algebra).sum().item() for u in units)
    return traffic.calls, collectives.get_total_counts(), held, solved.matrices, predicted, [u.algebra for u in units]


@pytest.mark.parametrize(("method", "grid"), cases(LOW_RANK, [(1, 2), (2, 1), (2, 2)], ["spectron"]))
def test_gram_moves_r_by_r_only(forked, method, grid):
    found = forked(step, grid[0] * grid[1], method, *grid, "gram", {})
    world, factor = len(found), D * RANK * 4
    for calls, count, _, _, _, algebras in found:
        assert set(algebras) == {GRAM}
        assert len(calls) == count == (3 if method == "tsvd" else 2)
        assert max(size for _, size in calls) < factor, "of eight matrices together, less than one factor of one"
    sent = sum(
        size if name == "all_to_all" else 2 * (world - 1) * size / world  # a ring
        for calls, *_ in found
        for name, size in calls
    )
    assert sent == pytest.approx(found[0][4], abs=1e-6)


@pytest.mark.parametrize("method", ["spectron", "sct"])
def test_every_matrix_is_solved_once(forked, method):
    halves = [solved for _, _, _, solved, _, _ in forked(step, 2, method, 1, 2, "gram", {})]
    quarters = [solved for _, _, _, solved, _, _ in forked(step, 4, method, 2, 2, "gram", {})]
    assert halves == [2 * quarters[0]] * 2
    assert quarters == [quarters[0]] * 4
    assert quarters[0] > 0


@pytest.mark.parametrize(
    ("method", "grid"), cases(["dense-muon", *LOW_RANK], [(1, 2), (1, 4), (2, 2)], ["dense-muon", "sct"])
)
def test_owner_moves_each_shard_to_its_owner_and_back(forked, method, grid):
    for calls, count, held, _, _, _ in forked(step, grid[0] * grid[1], method, *grid, "owner", {}):
        assert len(calls) == count == 2
        assert sum(size for _, size in calls) <= 2 * held


def test_auto_takes_what_moves_less(forked):
    (*_, algebras), *_ = forked(step, 2, "spectron", 1, 2, "auto", {})
    assert set(algebras) == {"gram"}  # rank 4 of 512


def test_a_step_that_fits_neither_form_is_refused(forked):
    with pytest.raises(AssertionError, match=r"parallel\.algebra gram: .*cayley"):
        forked(step, 2, "sct", 1, 2, "gram", {"retraction": "cayley"})
