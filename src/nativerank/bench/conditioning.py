"""What orthonormal factors buy, measured on trained models: docs/math.md, "What orthonormality buys", layer by layer.

Of every matrix of every run, from `factors()` alone, in r x r:

    sigma_max, spread      ||W||_2 and sigma_1 / sigma_r
    norm_slack             what the bound known without W's spectrum overstates: ||A|| ||B|| / ||W||_2; max|s| / ||W||_2
    imbalance              max(||A|| / ||B||, ||B|| / ||A||); 1 for frames
    condition              of the map from a step of the stored factors to dW: of a pair over all directions but the
                           gauge, of frames over those beyond their spans, where it is max|s| / min|s|
    balanced_condition     the least that a pair with this product can have, sqrt(2 sigma_1 / sigma_r)
    smallest_turn          of frames: the smallest scale within the spans, min |s_i - s_j| / sqrt(2), over max|s|
    off_orthonormal        of frames: max |Q^T Q - I|

Runs of one method, layer, rates and length are summarised together: median over their matrices and the largest, of
`smallest_turn` the smallest.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nativerank.bench.record import record
from nativerank.bench.retraction import off_orthonormal
from nativerank.hub.load import load
from nativerank.layers.base import factor_layers
from nativerank.linalg.jacobian import balanced_condition, frame_extremes, pair_extremes, smallest_turn
from nativerank.linalg.norms import spectral_norm

GROUP = ("method", "layer", "lr", "aux_lr", "steps")


def bench_conditioning(runs: Sequence[str]) -> dict[str, Any]:
    """Measures the models in run folders (or any folders that `load` reads).

    Args:
        runs: folders; their config.yaml names method, rate and seed.

    Raises:
        ValueError: a folder without a factorized model.
    """
    rows = [row for folder in runs for row in matrices(Path(folder))]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in GROUP), []).append(row)
    summaries = [summary(groups[key]) for key in sorted(groups, key=str)]
    return record("conditioning", {"runs": [str(folder) for folder in runs]}, summaries, torch.device("cpu"))


def matrices(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each matrix of the model of a run."""
    layers = factor_layers(load(folder))
    if not layers:
        raise ValueError(f"{folder} holds no factors")
    known = facts(folder)
    for name, layer in layers.items():
        factors = [factor.detach() for factor in layer.factors()]
        stacks = [factor.unbind(0) for factor in factors] if factors[0].ndim > 2 else [(factor,) for factor in factors]
        for number, one in enumerate(zip(*stacks, strict=True)):
            yield {**known, "matrix": name if len(stacks[0]) == 1 else f"{name}[{number}]", **measure(one)}


def facts(folder: Path) -> dict[str, Any]:
    """Method, rate, seed and steps of a run, None where it does not say."""
    import yaml

    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text()) if file.exists() else {}
    optim, train = config.get("optim", {}), config.get("train", {})
    return {
        "method": config.get("method"),
        "lr": optim.get("lr"),
        "aux_lr": optim.get("aux_lr"),
        "seed": train.get("seed"),
        "steps": train.get("steps"),
    }


def measure(factors: Sequence[Tensor]) -> dict[str, float | str | None]:
    """The figures of one matrix, from (A, B) or (U, s, V)."""
    A, B, s = factors[0], factors[-1], factors[1] if len(factors) == 3 else None
    sigma = spectrum(A if s is None else A * s, B)
    norms = [spectral_norm(X.double()).item() for X in (A, B)]
    known = norms[0] * norms[1] * (1.0 if s is None else s.abs().max().item())
    smallest, largest = pair_extremes(A, B) if s is None else frame_extremes(s)
    return {
        "layer": "A B^T" if s is None else "U diag(s) V^T",
        "rank": A.shape[-1],
        "sigma_max": sigma[0].item(),
        "spread": (sigma[0] / sigma[-1]).item(),
        "norm_slack": known / sigma[0].item(),
        "imbalance": max(norms[0] / norms[1], norms[1] / norms[0]),
        "condition": (largest / smallest).item(),
        "balanced_condition": balanced_condition(sigma).item(),
        "smallest_turn": None if s is None else (smallest_turn(s) / largest).item(),
        "off_orthonormal": None if s is None else max(off_orthonormal(A), off_orthonormal(B)),
    }


def spectrum(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of A B^T, descending, by QR in float64: the smallest of an ill-conditioned product count here."""
    R_A, R_B = (torch.linalg.qr(X.double(), mode="r").R for X in (A, B))
    return torch.linalg.svdvals(R_A @ R_B.mT)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst of each figure over the matrices of runs of one group."""
    figures = [key for key, value in rows[0].items() if isinstance(value, float) and key not in GROUP]
    return {
        **{key: rows[0][key] for key in GROUP},
        "seeds": len({row["seed"] for row in rows}),
        "matrices": len(rows),
        "median": {key: statistics.median(row[key] for row in rows) for key in figures},
        "worst": {key: (min if key == "smallest_turn" else max)(row[key] for row in rows) for key in figures},
    }
