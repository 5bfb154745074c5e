"""One product per expert, as one operator that a compiler takes for a black box.

    y_s = x_s M_e,   x (S, k),   M (E, k, n),   expert e owns rows offsets[e-1] : offsets[e]

How many rows each expert has is known only when it runs, and a graph of slices of unknown lengths is more than the
compiler of PyTorch 2.13 can turn into kernels. So compiled blocks call this where no kernel of PyTorch's own fits;
others run the same products one by one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def row_counts(offsets: Tensor) -> list[int]:
    """How many rows each expert owns; on a GPU this waits for the offsets."""
    ends = offsets.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@torch.library.custom_op("nativerank::grouped_product", mutates_args=())
def grouped_product(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """x (S, k), matrices (E, k, n), offsets (E,): gives (S, n)."""
    parts = zip(x.split(row_counts(offsets)), matrices.unbind(), strict=True)
    return torch.cat([part @ matrix for part, matrix in parts])


@torch.library.custom_op("nativerank::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """x (S, k), y (S, n), offsets (E,): x_e^T y_e of the rows of each expert, (E, k, n)."""
    rows = row_counts(offsets)
    return torch.stack([a.mT @ b for a, b in zip(x.split(rows), y.split(rows), strict=True)])


@grouped_product.register_fake
def _(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[2])


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], y.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
    x, matrices, offsets = ctx.saved_tensors
    return grouped_product(upstream, matrices.mT, offsets), grouped_outer(x, upstream, offsets), None


grouped_product.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.nativerank.grouped_product)
def _product_flops(x: torch.Size, matrices: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """2 S k n, whichever experts the rows went to."""
    return 2 * x[0] * x[1] * matrices[2]


@register_flop_formula(torch.ops.nativerank.grouped_outer)
def _outer_flops(x: torch.Size, y: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """2 S k n."""
    return 2 * x[0] * x[1] * y[1]
