"""Products of the factors in float8 (torchao), for GPUs that multiply it: weights and their optimizer stay as they are.

Each half of a factor pair whose sizes are multiples of 16 becomes torchao's `Float8Linear`, a Linear with the same
parameter objects under the same names, which rounds input, weight and output gradient to 8 bits with one scale each
before it multiplies them. Embedding, head, routers and attention are left alone. So a checkpoint and a saved model are
those of a run without it.
"""

from typing import Any

import torch
from torch import nn

from nativerank.extras import require
from nativerank.layers.base import factor_linears

CAPABILITY = (8, 9)  # Ada; Hopper and Blackwell have more
EMULATED = "--train.float8 true --train.float8_emulate true rounds alike on any device, slowly"
MULTIPLE = 16  # of both sizes of a matrix, for the hardware


def compute_in_float8(model: nn.Module, device: torch.device, emulate: bool = False) -> list[str]:
    """Swaps the halves of factor pairs for modules that multiply in float8, in place.

    Args:
        model: factorized.
        device: on which it will train.
        emulate: round as float8 does and multiply in the precision of the input: slower, and on any device.

    Returns:
        The names of the modules that were swapped.

    Raises:
        ValueError: a device that cannot, no torchao, no factors, or none whose sizes are multiples of 16.
    """
    if not emulate:
        check_device(device)
    float8: Any = require("torchao.float8", "quantize", "train.float8")
    halves = factor_linears(model)
    if not halves:
        raise ValueError("train.float8 is for factors, and the model has none: choose a low-rank method")
    chosen = [name for name, half in halves.items() if not any(size % MULTIPLE for size in half.weight.shape)]
    if not chosen:
        raise ValueError(
            f"train.float8 takes factors whose sizes are multiples of {MULTIPLE}, and none of the {len(halves)} here "
            "is; --rank.value sets their rank"
        )
    config, wanted = float8.Float8LinearConfig(emulate=emulate), frozenset(chosen)
    float8.convert_to_float8_training(model, module_filter_fn=lambda _, name: name in wanted, config=config)
    return chosen


def check_device(device: torch.device) -> None:
    """Raises a ValueError for a device without float8 products, which it names."""
    least = ".".join(map(str, CAPABILITY))
    wanted = f"train.float8 needs a CUDA GPU of compute capability {least} or above"
    if device.type != "cuda":
        raise ValueError(f"{wanted}, found {device.type}; {EMULATED}")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise ValueError(f"{wanted}, found {torch.cuda.get_device_name(device)} with {'.'.join(map(str, found))}")
