"""A linear map kept as a product of two thin factors.

    y = W x,   W = A B^T,   A: (d_out, r) = up.weight,   B: (d_in, r) = down.weight^T

W is never formed in training: x goes through the r-dimensional bottleneck. Per token this costs
2 r (d_in + d_out) FLOPs instead of 2 d_in d_out, so it pays only below the break-even rank
r* = d_in d_out / (d_in + d_out). The factors are two `nn.Linear`, so that whatever knows linears
(FP8 converters, quantizers, tensor-parallel plans, serving engines) knows them too.

A layer made by surgery keeps the emptied shell of the module it replaced (its type, hooks and attributes, no
weights), so that `restore` gives back that very module.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from nativerank.layers.base import Gemm, UnformedWeight, merge
from nativerank.layers.initialize import sampled_factors
from nativerank.layers.rank import check_rank
from nativerank.layers.shared import SharedInput
from nativerank.linalg.resize import Resized, Side, cropped, exchange, resized_pair
from nativerank.linalg.spectrum import product_spectrum


class LowRankLinear(nn.Module):
    """Maps (..., d_in) to (..., d_out) through `rank` dimensions.

    Args:
        d_in, d_out: sizes of input and output vectors.
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        bias: add a learned vector (d_out,) to the output; it belongs to `up`.
        device, dtype: of the parameters.
    """

    kind = "lowrank"  # its key in factorize.KINDS, kept by saved models
    shared: SharedInput | None = None  # with whom it reads its input, see `join_products`
    place = 0  # among them

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_rank(rank, d_in, d_out, type(self).__name__)
        where = torch.get_default_device() if device is None else torch.device(device)
        self.in_features, self.out_features = d_in, d_out
        self._shell: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no submodule
        self._allocate(rank, bias, where, dtype)
        if where.type != "meta":
            self.reset_parameters()

    def _allocate(self, rank: int, bias: bool, device: torch.device, dtype: torch.dtype | None) -> None:
        """Makes the parameters, unfilled."""
        # skip_init: nn.Linear's own numbers would be right for each factor alone, not for the product.
        self.down = nn.utils.skip_init(nn.Linear, self.in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.utils.skip_init(nn.Linear, rank, self.out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def replacing(cls, module: nn.Module, rank: int) -> Self:
        """An unfilled layer of this rank in the place of a linear `module`.

        The module loses its weight and bias to become the shell.

        `module.weight` is (d_out, d_in), or (d_in, d_out) in a transformers `Conv1D`.
        """
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        d_out, d_in = weight.mT.shape if is_conv1d(module) else weight.shape
        layer = cls(d_in, d_out, rank, device="meta", dtype=weight.dtype)
        layer.to_empty(device=weight.device).requires_grad_(weight.requires_grad).train(module.training)
        layer.up.bias = bias  # the same parameter, so an optimizer that knows it still does
        module.weight, module.bias = None, None  # type: ignore[assignment]
        layer._shell = (module,)
        return layer

    def share(self, other: Self) -> None:
        """Takes over the factors of the `other` layer, for modules whose weights were tied."""
        self.up.weight, self.down.weight = other.up.weight, other.down.weight

    @torch.no_grad()
    def resize(self, rank: int, generator: torch.Generator | None = None) -> list[Resized]:
        """Another rank, in place: W stays but for the energy that is dropped. The parameters stay the same objects.

        Args:
            rank: smaller keeps the leading singular directions, balanced; larger appends columns that change nothing.
            generator: draws new columns, on the CPU.

        Returns:
            What became of each parameter's columns, for `LowRankOptimizer.resize`.

        Raises:
            ValueError: a rank outside [1, min(d_in, d_out)].
        """
        check_rank(rank, self.in_features, self.out_features, type(self).__name__)
        return self._take(self._resized(rank, generator)) if rank != self.rank else []

    @torch.no_grad()
    def reshape(self, rank: int) -> list[Resized]:
        """Parameters of another rank for numbers that are loaded next: first columns kept, new ones zero."""
        check_rank(rank, self.in_features, self.out_features, type(self).__name__)
        return self._take([cropped(X, rank) for X in self.factors()]) if rank != self.rank else []

    def _resized(self, rank: int, generator: torch.Generator | None) -> Sequence[Side]:
        """The factors at another rank, in the order of `factors()`."""
        A, B = self.factors()
        return resized_pair(A, B, rank, generator)

    def _take(self, sides: Sequence[Side]) -> list[Resized]:
        """Puts factors of another rank into the parameters: up, then down."""
        up, down = sides
        self.up.in_features = self.down.out_features = up.X.shape[-1]
        return [exchange(self.up.weight, up), exchange(self.down.weight, down, down=True)]

    def restore(self) -> nn.Module:
        """The module that was here before, with W merged into its weight; an `nn.Linear` if there was none."""
        W = self.to_dense().detach()
        if self.shared is not None:
            self.shared.leave(self.place)
        if self._shell:
            (module,) = self._shell
        else:
            module = nn.Linear(self.in_features, self.out_features, bias=self.up.bias is not None, device="meta")
        if is_conv1d(module):
            W = W.mT.contiguous()
        module.weight = nn.Parameter(W, requires_grad=self.up.weight.requires_grad)
        module.bias = self.up.bias
        return module.train(self.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws factors with the spectrum and output variance that nn.Linear's default weight has; bias as there."""
        self.fill(*sampled_factors(self.in_features, self.out_features, self.rank, std=(3 * self.in_features) ** -0.5))
        if self.up.bias is not None:
            nn.init.uniform_(self.up.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @torch.no_grad()
    def fill(self, A: Tensor, B: Tensor) -> None:
        """Copies factors A (d_out, r) and B (d_in, r) into the parameters, in the parameters' dtype."""
        self.up.weight.copy_(A)
        self.down.weight.copy_(B.mT)

    @property
    def rank(self) -> int:
        """Inner dimension r."""
        return self.down.weight.shape[0]

    @property
    def weight(self) -> UnformedWeight:
        """What W (d_out, d_in) would be, but for its numbers; `to_dense` has these."""
        return UnformedWeight((self.out_features, self.in_features), self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        h = self.inner(x)  # (..., r)
        return self.up(h)  # (..., d_out)

    def inner(self, x: Tensor) -> Tensor:
        """B^T x, (..., d_in) -> (..., r); one product with the layers that read the same x, if there are such."""
        return self.down(x) if self.shared is None else self.shared.product(self, x)

    def factors(self) -> tuple[Tensor, ...]:
        """The tall views (A, B) of shapes (d_out, r) and (d_in, r); they share memory with the parameters."""
        return self.up.weight, self.down.weight.mT

    def to_dense(self) -> Tensor:
        """W = A B^T, (d_out, d_in), merged in float64. For export and tests: forming it undoes the saving."""
        return merge(*self.factors())

    def gemms(self) -> list[Gemm]:
        """Every matmul of one forward pass. FLOPs are derived from this list and nowhere else."""
        return [Gemm(self.in_features, self.rank), Gemm(self.rank, self.out_features)]

    def spectrum(self) -> Tensor:
        """The singular values of W (r,), descending, in float64; W is not formed."""
        A, B = self.factors()
        return product_spectrum(A, B)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.up.bias is not None}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, a linear layer with the weight stored as (d_in, d_out).

    Told by its looks: importing transformers to ask costs seconds.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")
