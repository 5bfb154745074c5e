"""Memory and traffic on large grids, on paper: read off real wrapping by a process that believes to be one of many."""

import json
from pathlib import Path

import pytest
import torch

from nativerank.accounting.traffic import GATHER, held_state_bytes, scale_on_paper, solve_flops, state_bytes
from nativerank.bench.paper import bench_paper, on_paper
from nativerank.config import RunConfig
from nativerank.distributed.pieces import local
from nativerank.distributed.pretend import pretended
from nativerank.linalg.orthogonalize import orthogonalize_flops
from nativerank.methods import build_optimizer, factorize
from nativerank.models import find_preset, hf_config, skeleton
from nativerank.optim.units import GRAM, OWNER
from nativerank.train.setup import spread

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "bench-distributed-paper.json"


def spread_out(preset, grid, method, **ranks):
    """A preset on the meta device, wrapped for the grid."""
    model = skeleton(hf_config(find_preset(preset)))
    factorize(model, method, **ranks)
    spread(RunConfig(method=method), model, grid)
    return model


@pytest.mark.parametrize("algebra", ["auto", "gram", "owner"])
@pytest.mark.parametrize(("method", "rank"), [("spectron", 0), ("sct", 5), ("tsvd", 15)])
def test_what_a_process_keeps_is_what_its_optimizer_holds(method, rank, algebra):
    with pretended(2, 8, rank) as grid:
        model = spread_out("pocket", grid, method, rank=32)
        optimizer = build_optimizer(model, method, grid=grid, algebra=algebra)
        found = scale_on_paper(model, optimizer.param_groups, grid)
        foretold = state_bytes(optimizer.param_groups, optimizer.layout.units, grid)[grid.rank]
        assert held_state_bytes(optimizer) == foretold.item()
        parameters = sum(local(p.detach()).nbytes for p in model.parameters())
        assert found["bytes"]["parameters"] == parameters
        assert parameters < sum(p.numel() * p.element_size() for p in model.parameters()) / 7


@pytest.mark.parametrize("grid", [(1, 8), (4, 2), (8, 1)], ids=lambda grid: "{}x{}".format(*grid))
@pytest.mark.parametrize("rank", [4, 32])
def test_auto_is_never_above_the_best(grid, rank):
    case = on_paper("pocket", *grid, method="spectron", rank=rank)
    moved = {way: part["bytes"]["total"] for way, part in case["optimizer"].items()}
    assert moved["auto"] <= min(moved[GRAM], moved[OWNER])
    if grid[1] > 1:
        assert moved["auto"] <= moved[GATHER]
    flops = case["optimizer"]
    assert 8 * flops["auto"]["r_by_r_flops"] == pytest.approx(flops[GATHER]["r_by_r_flops"])
    assert flops["auto"]["largest_r_by_r_flops"] < flops[GATHER]["r_by_r_flops"] / 4


def test_r_by_r_flops_are_those_of_the_orthogonalizer():
    up, down = torch.empty(48, 16, device="meta"), torch.empty(16, 32, device="meta")
    options = {"rule": "spectron", "orthogonalizer": "newton-schulz", "orthogonalizer_steps": 5}
    both = orthogonalize_flops(48, 16, 5) + orthogonalize_flops(32, 16, 5)
    assert solve_flops([up, down], options) == both - 4 * (48 + 32) * 16**2
    assert solve_flops([up, down], {**options, "orthogonalizer": "none"}) == 0


def test_a_group_of_processes_cannot_pretend():
    with pretended(1, 2), pytest.raises(ValueError, match="call this without torchrun"), pretended(1, 2):
        pass


@pytest.mark.slow
def test_the_models_of_the_record():
    """spectron-l on 64 and llama3-70b on 512, factors of a quarter of the width."""
    cases = {(c["preset"], c["replicas"], c["shards"]): c for c in bench_paper()["cases"]}
    stored = {(c["preset"], c["replicas"], c["shards"]): c for c in json.loads(RECORD.read_text())["cases"]}
    assert set(stored) == set(cases)
    for (preset, *grid), case in cases.items():
        for way, part in case["optimizer"].items():
            recorded = stored[preset, *grid]["optimizer"][way]
            assert part["bytes"] == pytest.approx(recorded["bytes"]), (preset, grid, way)
            assert part.get("largest_bytes") == pytest.approx(recorded.get("largest_bytes")), (preset, grid, way)
            assert part["r_by_r_flops"] == recorded["r_by_r_flops"]
        largest = {way: case["optimizer"][way]["largest_bytes"] for way in ("auto", GRAM, OWNER)}
        assert largest["auto"] <= 1.01 * min(largest.values()), "the process that the step waits for"
        gathered = case["optimizer"][GATHER]["bytes"]["total"]  # as much on every process
        assert gathered >= (4 if grid[1] * grid[0] >= 64 else 2) * largest["auto"], (preset, grid)
        assert case["gather_over_auto"] >= (4 if grid[1] * grid[0] >= 64 else 2), (preset, grid)
        assert case["bytes"]["optimizer_of_rank_0"] <= case["optimizer"]["auto"]["largest_state_bytes"]
        assert case["cut_along_rows"] == []
    large = cases["llama3-70b", 1, 512]
    assert large["bytes"]["parameters"] < 70e9 * 4 / 512 / 2
    assert large["optimizer"]["auto"]["matrices"] == {OWNER: 560}
