"""AdamW's moments of embedding and head in 8 bits each, a quarter of their memory.

    means of gradients      sign, 4 exponent and 3 mantissa bits, times scale         smallest 1.25 * 2^-16
    means of squares        5 exponent and 3 mantissa bits, no sign, times scale      smallest 1.25 * 2^-32

A magnitude c > 0 is the float32 whose upper 12 bits are c + 1016 - top, so the largest, top = 127 or 255, is 1; 0 is
0. A scale is the largest magnitude among 256 neighbours in a row (among all of a shorter row), in float32. Blocks end
with their rows: a token's moments do not depend on how loud another token is, and wherever rows are cut for another
number of processes, codes and scales are cut alike.

Both are rounded up or down, within 1/8 of themselves, by the noise of `optim.precision`, here of the element's place in
the whole parameter: right on average, where to nearest a square at beta2 0.999 or a mean at beta1 0.95 would not fall.
A square that is not zero is not rounded to zero but up to the smallest: too large a square makes a step shorter, a lost
one would divide a mean by eps.

Four bits of exponent for means: Peng et al. 2023 (arXiv 2310.18313); scaled blocks of moments: Dettmers et al. 2022
(arXiv 2110.02861). Not torchao.optim's OptimState8bit (0.18): its blocks run over the flat tensor, of which every
shard must hold a multiple of 256 entries; it rounds to nearest, squares below 2e-7 of the scale to zero; and its
optimizer compiles the update. Costs about 30 passes over a parameter, a few rows at a time.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nativerank.optim.directions import WIDE_AT_ONCE, Options, Stack, State, adamw_direction
from nativerank.optim.precision import RANGE, noise

BLOCK = 256
TOP_MEAN, TOP_SQUARE = 127, 255
SMALLEST_MEAN = 1.25 * 2**-16  # of code 1
CUT_BITS, ONE = 20, 1016  # lower bits of a float32 that are cut off; the upper ones of 1.0
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
KEPT = ("exp_avg", SCALES[0], "exp_avg_sq", SCALES[1])


def scale_shape(held: Tensor) -> tuple[int, int]:
    """Scales (rows, blocks) of what is held of a parameter (rows, ...)."""
    return len(held), -(-held.shape[1:].numel() // BLOCK)


def shares_of(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes (n, c) as shares of the largest of their block, and these (n, blocks)."""
    n, c = magnitudes.shape
    blocks = -(-c // BLOCK)
    scale = pad(magnitudes, (0, blocks * BLOCK - c)).view(n, blocks, BLOCK).amax(-1)
    return (magnitudes / spread(scale.masked_fill(scale == 0, 1.0), c)).contiguous(), scale


def spread(scale: Tensor, c: int) -> Tensor:
    """Each element's scale (n, c), or (n, 1) where a row is one block."""
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(BLOCK, 1)[:, :c]


def encode_mean(x: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, c) and scales of x (n, c) float32; `below` (n, c) is 16-bit noise that rounds."""
    shares, scale = shares_of(x.abs())
    up = shares * (RANGE / SMALLEST_MEAN) > below  # what is smaller still becomes that or 0
    codes = torch.where(shares < SMALLEST_MEAN, up.int(), to_magnitudes(shares, below, TOP_MEAN))
    return codes.add_((x < 0).int(), alpha=TOP_MEAN + 1).to(torch.uint8), scale


def decode_mean(codes: Tensor, scale: Tensor) -> Tensor:
    """x (n, c) float32."""
    shares = from_magnitudes(codes & TOP_MEAN, TOP_MEAN)
    return shares.mul_(1 - (codes >> 7).float() * 2).mul_(spread(scale, codes.shape[1]))


def encode_squares(x: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """The same for x (n, c) that is not negative."""
    shares, scale = shares_of(x)
    codes = torch.maximum(to_magnitudes(shares, below, TOP_SQUARE), (x > 0).int())
    return codes.to(torch.uint8), scale


def decode_squares(codes: Tensor, scale: Tensor) -> Tensor:
    """x (n, c) float32."""
    return from_magnitudes(codes, TOP_SQUARE).mul_(spread(scale, codes.shape[1]))


def to_magnitudes(shares: Tensor, below: Tensor, top: int) -> Tensor:
    """Codes (n, c) int32 in [0, top] of shares of a scale, in [0, 1]."""
    codes = (shares.view(torch.int32) + (below << (CUT_BITS - 16))) >> CUT_BITS
    return codes.sub_(ONE - top).clamp_(0, top)


def from_magnitudes(codes: Tensor, top: int) -> Tensor:
    """Shares of a scale, float32."""
    return ((codes.int() + (ONE - top)) << CUT_BITS).view(torch.float32).mul_(codes > 0)


def step_in_8_bits(parameter: Tensor, gradient: Tensor, state: State, options: Options, first_row: int = 0) -> None:
    """AdamW on what a process holds of a parameter (rows, ...), a few rows at a time; its first row in the whole."""
    parameter.mul_(1 - options["lr"] * options["weight_decay"])
    c, kept = parameter.shape[1:].numel(), [state[name].flatten(1) for name in KEPT]
    rows = max(1, WIDE_AT_ONCE // c)
    for weight, grad, *parts in zip(*(x.split(rows) for x in (parameter, gradient, *kept)), strict=True):
        m, v = decode_mean(*parts[:2]), decode_squares(*parts[2:])
        moments = {"exp_avg": m[None], "exp_avg_sq": v[None], "step": state["step"][None].clone()}
        D = adamw_direction(Stack(grad.flatten(1)[None], moments, ()), options)
        weight.sub_(D.view(weight.shape))
        below = noise(moments["step"].to(v.device), v.shape, first_row * c)[0]
        for part, value in zip(parts, (*encode_mean(m, below), *encode_squares(v, below)), strict=True):
            part.copy_(value)
        first_row += len(weight)
    state["step"] += 1
