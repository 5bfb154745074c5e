"""A linear map kept as its own truncated singular value decomposition.

    y = W x,   W = U diag(s) V^T,   U: (d_out, r) = up.weight,   V: (d_in, r) = down.weight^T,   s: (r)

The columns of U and V are orthonormal; the update rules of `optim.frames` keep them so. Then |s| is the spectrum of W,
||W||_2 = max|s|, and x -> W x stretches nothing by more. W is never formed: three small products per token, of which
the middle one is an elementwise multiplication. s may change sign and order in training. It stays in float32 when the
layer is cast to bf16, where a value of 0.5 could not move by 3e-4.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from nativerank.layers.base import merge, wide_dtype
from nativerank.layers.lowrank import LowRankLinear
from nativerank.linalg.resize import Resized, Side, exchange, resized_frames
from nativerank.linalg.spectrum import product_spectrum, spectral_form


class SpectralLinear(LowRankLinear):
    """Maps (..., d_in) to (..., d_out) through `rank` singular directions; the arguments (d_in, d_out, rank, bias,
    device, dtype) are LowRankLinear's."""

    kind = "spectral"
    s: nn.Parameter

    def _allocate(self, rank: int, bias: bool, device: torch.device, dtype: torch.dtype | None) -> None:
        super()._allocate(rank, bias, device, dtype)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.s = nn.Parameter(torch.empty(rank, device=device, dtype=wide))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.s.detach()
        super()._apply(fn, recurse)
        if self.s.dtype in (torch.bfloat16, torch.float16):
            self.s.data = before.to(self.s.device)
        return self

    def share(self, other: Any) -> None:
        super().share(other)
        self.s = other.s

    @torch.no_grad()
    def fill(self, A: Tensor, B: Tensor) -> None:
        """Takes up W = A B^T, A (d_out, r), B (d_in, r), as its singular value decomposition, s descending."""
        U, s, V = spectral_form(A, B)
        super().fill(U, V)
        self.s.copy_(s)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        h = self.inner(x)  # (..., r)
        return self.up(h * self.s.to(h.dtype))  # (..., d_out)

    def factors(self) -> tuple[Tensor, ...]:
        """(U, s, V) of shapes (d_out, r), (r) and (d_in, r); they share memory with the parameters."""
        return self.up.weight, self.s, self.down.weight.mT

    def _resized(self, rank: int, generator: torch.Generator | None) -> Sequence[Side]:
        U, s, V = self.factors()
        return resized_frames(U, s, V, rank, generator)

    def _take(self, sides: Sequence[Side]) -> list[Resized]:
        up, s, down = sides
        return [*super()._take([up, down]), exchange(self.s, s)]

    def to_dense(self) -> Tensor:
        """W = U diag(s) V^T, (d_out, d_in), merged in float64."""
        U, s, V = self.factors()
        wide = wide_dtype(U.device)
        return merge(U.to(wide) * s.to(wide), V).to(U.dtype)

    def spectrum(self) -> Tensor:
        """The singular values of W (r,), descending, in float64: |s| sorted, as far as U and V are orthonormal."""
        U, s, V = self.factors()
        return product_spectrum(U.to(s.dtype) * s, V)
