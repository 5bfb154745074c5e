"""What orthonormal factors cost: steps of one model whose frames are kept in different ways, or not at all.

    free                U diag(s) V^T without any constraint, fused AdamW: the work that all have in common
    sct, tsvd, stiefel-spectron      the methods
    QR per forward      TSVD written down directly: raw factors and a QR in every forward pass, through autograd

All see the same micro-batches in turns. A side's share is what it takes beyond `free`, over its own step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nativerank.bench.measure import check_sizes, race, ratio
from nativerank.bench.record import raced, record
from nativerank.layers.base import factor_layers
from nativerank.methods import build_optimizer, factorize
from nativerank.models import Preset, find_preset, hf_config, materialize, scaled, skeleton
from nativerank.train.setup import pick_device
from nativerank.train.step import Batch, train_step

METHODS = ("sct", "tsvd", "stiefel-spectron")
FREE, PER_FORWARD = "free", "QR per forward"


class Frame(nn.Module):
    """X (rows, cols) -> the frame of its long side, by QR with diag(R) > 0."""

    def forward(self, X: Tensor) -> Tensor:
        wide = X.shape[0] < X.shape[1]
        Q, R = torch.linalg.qr(X.mT if wide else X)
        Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
        return Q.mT if wide else Q


def make(preset: Preset, side: str, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model of one side with its optimizer, from the same start as all others."""
    model = skeleton(hf_config(preset))
    factorize(model, "sct", rank_ratio=preset.ratio, rank=preset.value)
    model = materialize(model, seed=0, init_scale=3**-0.5, init="sampled").to(device).train()
    if side in METHODS:
        return model, build_optimizer(model, side)
    if side == PER_FORWARD:
        for layer in factor_layers(model).values():
            for half in (layer.up, layer.down):
                parametrize.register_parametrization(half, "weight", Frame())
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=device.type != "mps")


def bench_frames(
    preset_name: str = "demo",
    d_model: int | None = None,
    layers: int | None = None,
    batch_size: int | None = None,
    micro_batches: int = 8,
    repeats: int = 5,
    device: str = "cpu",
) -> dict[str, Any]:
    """Times steps of `micro_batches` passes each.

    Args:
        preset_name: shapes. d_model, layers, batch_size: override them; batch_size counts sequences of one pass.
        micro_batches: forward and backward passes per step.
        repeats: recorded steps of each side, after one that is not.
        device: cpu, cuda or mps.

    Returns:
        A race of steps, and `share`: the median over rounds of 1 - free / side.
    """
    check_sizes(repeats=repeats, d_model=d_model, layers=layers, batch_size=batch_size, micro_batches=micro_batches)
    preset = scaled(find_preset(preset_name), d_model, layers)
    batch_size, where = batch_size or preset.batch_size, pick_device(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(preset.vocab_size, (micro_batches, batch_size, preset.context + 1), generator=generator)
    batches: list[Batch] = [(x[:, :-1], x[:, 1:], None) for x in ids.to(where)]

    def steps(side: str) -> Callable[[], Any]:
        model, optimizer = make(preset, side, where)
        return lambda: train_step(model, optimizer, batches, accumulation=micro_batches, clip=0.0)

    seconds = race({side: steps(side) for side in (FREE, *METHODS, PER_FORWARD)}, repeats, where)
    share = {side: 1 - ratio(seconds[FREE], times) for side, times in seconds.items()}
    settings: dict[str, Any] = {
        "preset": preset_name,
        "d_model": preset.d_model,
        "layers": preset.layers,
        "repeats": repeats,
    }
    settings |= {"batch_size": batch_size, "micro_batches": micro_batches, "device": device}
    case = {"micro_batches": micro_batches, "tokens_per_step": micro_batches * batch_size * preset.context}
    return record("frames", settings, [raced(case, FREE, seconds, share=share)], where)
