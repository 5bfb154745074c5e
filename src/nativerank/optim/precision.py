"""Optimizer state kept in bfloat16: computed in float32, rounded where it is kept, half the memory.

Of embedding and head 8 bits may do: `optim.float8` has the codes, here is who gets them.

To nearest, a change below 2^-9 of a value is lost (below 2^-8 at worst). A mean of gradients at beta 0.9 or 0.95 moves
by that much as soon as a gradient differs from it by a twelfth, which noise sees to. A mean of squares at beta 0.999
falls by a thousandth at most: to nearest it would stay at the largest value it ever had. So squares go up or down such
that the mean over steps is right, by adding below the last bit that is kept

    noise_i(t) = frac(a i + b t),  a = 40503 / 2^16, b = 27145 / 2^16      (both odd: every 16-bit number comes once)

and cutting off. It needs no generator, so updates may come in any order and a resumed run has the same bits.
"""

import functools
import math

import torch
from torch import Tensor

from nativerank.linalg.gram import at_least_float32
from nativerank.linalg.host import has_values

ACROSS, ALONG, RANGE = 40503, 27145, 1 << 16
LEAST_FOR_8_BITS = 4096  # elements: less is not worth it (routers, positions)


def kept_as(parameter: Tensor, name: str) -> str:
    """The option `state_dtype` as far as this whole parameter is concerned: vectors and small ones stay as they are."""
    if parameter.dim() < 2 or (name == "fp8" and parameter.numel() < LEAST_FOR_8_BITS):
        return "fp32"
    return name


def state_dtype(parameter: Tensor, name: str) -> torch.dtype:
    """What means of this parameter's gradients are kept in, by an option that `kept_as` has seen."""
    if name == "fp8":
        return torch.uint8  # codes
    narrow = name == "bf16" and parameter.dim() > 1 and parameter.dtype in (torch.float32, torch.float64)
    return torch.bfloat16 if narrow else parameter.dtype


def widened(kept: Tensor) -> Tensor:
    """A mean to compute with: the kept one itself where it is wide enough."""
    return at_least_float32(kept) if kept.dtype == torch.bfloat16 else kept


def keep(kept: Tensor, value: Tensor) -> None:
    """Rounds a mean of gradients to nearest, where it is kept narrower than it was computed."""
    if value is not kept:
        kept.copy_(value)


def keep_squares(kept: Tensor, value: Tensor, step: Tensor) -> None:
    """Rounds a mean of squares (n, ...) up or down by the noise of its elements and of the members' steps (n)."""
    if value is kept:
        return
    if value.dim() > 2 and not value.is_contiguous():  # the tall view of a matrix that lies flat
        kept, value = kept.mT, value.mT
    bits = value.float().contiguous().view(torch.int32)
    bits = (bits + noise(step.to(value.device), value.shape[1:])).bitwise_and_(-RANGE)
    kept.copy_(bits.view(torch.float32))


def noise(step: Tensor, shape: tuple[int, ...], first: int = 0) -> Tensor:
    """16-bit numbers (n, *shape) for members at these steps (n), whose elements are numbered from `first` on."""
    moved = ((step.long() * ALONG + first * ACROSS) % RANGE).int()
    row = across if has_values(step) else across.__wrapped__  # what has no values must not stay
    return (row(math.prod(shape), step.device).view(shape) + moved.view(-1, *(1 for _ in shape))) & (RANGE - 1)


@functools.lru_cache(maxsize=16)
def across(count: int, device: torch.device) -> Tensor:
    """The noise of `count` elements at step 0, as 16-bit numbers (count)."""
    return (torch.arange(count, dtype=torch.int64, device=device) * ACROSS % RANGE).int()
