"""What an update rule on row shards asks the other processes for.

A gram rule is a generator. It computes partial sums over this process's rows, yields them as an Ask, is sent the answer
and returns what an ordinary rule returns, for its rows:

    answer = yield Ask({"G": symmetric(gram(rows(M)))}, solve)      M (n, d_local, r), rows(M) (n, <= d_local, r)

The engine adds the parts of all rules up over the processes, each unit's in one place, calls `solve` there and hands
every process the results of all units: an all-to-all there and one back for all rules together. They move the bytes of
a reduce-scatter and an all-gather, which would want as much for every process and one dtype; owners have unequal
shares, parts are of any dtype, and the shards of units in the other algebra (`owner`) travel in the same two. Without
`solve` the sums themselves are the answer: one all-reduce.
"""

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

Form = Literal["whole", "symmetric", "upper"]
Answer = dict[str, Tensor]
Solve = Callable[[Mapping[str, Tensor], list[dict[str, Tensor]], Mapping[str, Any]], Mapping[str, "Part"]]


@dataclass(frozen=True)
class Part:
    """A stack (n, ...) on its way; of square (n, ..., r, r) the triangle alone where the rest is known."""

    tensor: Tensor
    form: Form = "whole"


def symmetric(G: Tensor) -> Part:
    """A stack of symmetric matrices (n, ..., r, r)."""
    return Part(G, "symmetric")


def upper(R: Tensor) -> Part:
    """A stack of upper triangular matrices (n, ..., r, r)."""
    return Part(R, "upper")


def whole(x: Tensor) -> Part:
    """Any stack (n, ...)."""
    return Part(x)


@dataclass(frozen=True)
class Ask:
    """Partial sums by name, and what is made of their totals: solve(totals, small states per side, options)."""

    parts: Mapping[str, Part]
    solve: Solve | None = None


Asking = Generator[Ask, Answer, Any]


@lru_cache(maxsize=64)
def _triangle(r: int, device: torch.device) -> Tensor:
    rows, columns = torch.triu_indices(r, r, device=device)
    return rows * r + columns


def packed(part: Part) -> Tensor:
    """The numbers that travel: all of them (n, ...), or the upper triangles (n, ..., r (r + 1) / 2)."""
    if part.form == "whole":
        return part.tensor
    r = part.tensor.shape[-1]
    return part.tensor.reshape(*part.tensor.shape[:-2], r * r)[..., _triangle(r, part.tensor.device)]


def packed_shape(part: Part) -> torch.Size:
    """That of `packed`."""
    shape = part.tensor.shape
    return shape if part.form == "whole" else torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def unpacked(flat: Tensor, form: Form) -> Tensor:
    """The inverse of `packed`."""
    if form == "whole":
        return flat
    r = (math.isqrt(8 * flat.shape[-1] + 1) - 1) // 2
    out = flat.new_zeros(*flat.shape[:-1], r * r)
    out[..., _triangle(r, flat.device)] = flat
    out = out.view(*flat.shape[:-1], r, r)
    return out if form == "upper" else out + out.triu(1).mT
