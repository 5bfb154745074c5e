"""Training on many processes, on paper: real wrapping and a real optimizer, but no memory and nobody on the line.

The model is on the meta device, the process group is PyTorch's fake one, in which this process plays rank 0 of as many
as wanted. Shards are what FSDP2 made of the parameters; `accounting.traffic` counts what a step would move.
"""

from typing import Any

import torch

from nativerank.accounting.traffic import GATHER, held_state_bytes, scale_on_paper
from nativerank.bench.measure import check_sizes
from nativerank.bench.record import record
from nativerank.config import RunConfig
from nativerank.distributed.pretend import pretended
from nativerank.methods import build_optimizer, factorize, find_method
from nativerank.models import find_preset, hf_config, skeleton
from nativerank.train.setup import spread

CASES = (("spectron-l", 1, 8), ("spectron-l", 1, 16), ("spectron-l", 1, 64), ("spectron-l", 8, 8))
LARGE = (("llama3-70b", 1, 64), ("llama3-70b", 1, 512), ("llama3-70b", 64, 8))
RATIO = 0.25


def bench_paper(
    preset_name: str | None = None,
    method: str = "spectron",
    replicas: int = 1,
    shards: int = 64,
    ratio: float | None = None,
    rank: int | None = None,
) -> dict[str, Any]:
    """Bytes and r x r FLOPs per process, of one model on one grid or of all of the record.

    Args:
        preset_name: one model; None takes CASES and LARGE, at rank ratio 0.25, and `replicas`, `shards` do not count.
        method: row of the method table.
        replicas, shards: of the grid.
        ratio, rank: of the factors; a quarter where neither is given.
    """
    check_sizes(replicas=replicas, shards=shards, rank=rank)
    grids = CASES + LARGE if preset_name is None else ((preset_name, replicas, shards),)
    cases = [on_paper(*case, method=method, ratio=ratio, rank=rank) for case in grids]
    settings: dict[str, Any] = {"preset": preset_name, "method": method, "ratio": ratio, "rank": rank}
    settings |= {"replicas": replicas, "shards": shards} if preset_name else {}
    return record("distributed, on paper", settings, cases, torch.device("cpu"))


def on_paper(
    preset_name: str, replicas: int, shards: int, *, method: str, ratio: float | None = None, rank: int | None = None
) -> dict[str, Any]:
    """One model on one grid."""
    ratio = RATIO if ratio is None and rank is None else ratio
    model = skeleton(hf_config(find_preset(preset_name)))
    if find_method(method).layer:
        factorize(model, method, rank_ratio=ratio, rank=rank)
    with pretended(replicas, shards) as grid:
        # Whole parameters stay as they are; DDP around them would look at their numbers.
        uneven = spread(RunConfig(method=method), model, grid)[1] if shards > 1 else []
        optimizer = build_optimizer(model, method, grid=grid)
        found = scale_on_paper(model, optimizer.param_groups, grid)
        found["bytes"]["optimizer_of_rank_0"] = held_state_bytes(optimizer)
    moved = {way: part["bytes"]["total"] for way, part in found["optimizer"].items()}
    return {
        "preset": preset_name,
        "method": method,
        "ratio": ratio,
        "rank": rank,
        **found,
        "cut_along_rows": uneven,
        "gather_over_auto": moved[GATHER] / moved["auto"],
    }
