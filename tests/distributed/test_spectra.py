"""Spectra of layers that many processes hold: those of one process, each r x r problem solved once, two exchanges."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode

from nativerank.distributed.grid import SINGLE, make_grid
from nativerank.layers import LowRankLinear, SpectralLinear
from nativerank.layers.experts import LowRankExperts
from nativerank.rank import spectra as spectra_module
from nativerank.rank.spectra import spectra

D_IN, D_OUT, EXPERTS = 24, 18, 3


def layers(bad=False):
    torch.manual_seed(0)
    found = nn.ModuleDict(
        {
            "pair": LowRankLinear(D_IN, D_OUT, 5),
            "triple": SpectralLinear(D_IN, D_OUT, 5),
            "uneven": LowRankLinear(D_OUT + 1, D_IN, 5),  # its down is cut along the rank
            "experts": LowRankExperts(EXPERTS, D_IN, D_OUT, 4),
            "wide": SpectralLinear(D_IN, D_OUT, 15),  # more columns than a shard has rows
        }
    )
    with torch.no_grad():
        found["triple"].s.neg_()
        if bad:
            found["pair"].up.weight[-1, 0] = torch.nan
    return found


def placement(p):
    return Shard(1) if p.dim() == 2 and p.shape[1] == D_IN else Shard(0)


def on_processes(rank, replicas, shards, bad):
    grid, model, solved = make_grid(replicas, shards, "cpu"), layers(bad), []
    if shards > 1:
        mesh = grid.mesh["shard"] if replicas == 1 else grid.mesh
        for layer in model.values():
            fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    original = spectra_module.spectrum_of_grams
    spectra_module.spectrum_of_grams = lambda *grams: solved.append(1) or original(*grams)
    with CommDebugMode() as comm:
        found = spectra(model, grid)
    return found, len(solved), {str(op): n for op, n in comm.get_comm_counts().items()}


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (1, 3)], ids=lambda grid: "{}x{}".format(*grid))
def test_spectra_are_those_of_one_process(forked, grid):
    alone = spectra(layers(), SINGLE)
    results = forked(on_processes, grid[0] * grid[1], *grid, False)
    for found, _, calls in results:
        assert list(found) == list(alone)
        for name, value in alone.items():
            assert torch.equal(found[name], results[0][0][name]), "the same bits everywhere"
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
        assert sum(calls.values()) == (2 if grid[1] > 1 else 1), calls
    assert sum(solved for _, solved, _ in results) == len(alone), "each problem on one process"


def test_a_factor_that_is_not_finite_shows_everywhere(forked):
    for found, _, _ in forked(on_processes, 2, 1, 2, True):
        assert found["pair"].isnan().all() and not any(v.isnan().any() for k, v in found.items() if k != "pair")
