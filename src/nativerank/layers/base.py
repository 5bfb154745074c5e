"""What every factored layer offers, and the product that turns factors back into a matrix.

    W = A B^T,   A (..., d_out, r),   B (..., d_in, r)        (leading dims: a stack of matrices, e.g. one per expert)

Optimizers, FLOP accounting and export know layers only through the protocol `FactorLayer`: they ask a module whether
it has these members and never test for a class, so a new layer kind needs no change there.
"""

from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from nativerank.linalg.resize import Resized


class Gemm(NamedTuple):
    """One matmul of a forward pass: each token's vector of length k meets a (k, n) matrix, `count` times per token."""

    k: int
    n: int
    count: float = 1.0  # type: ignore[assignment]  # hides tuple.count, which nobody needs here

    @property
    def flops(self) -> float:
        """FLOPs per token; a multiply-add counts as two."""
        return 2 * self.k * self.n * self.count


@runtime_checkable
class FactorLayer(Protocol):
    """A module that holds W (..., d_out, d_in) as thin factors."""

    @property
    def rank(self) -> int:
        """Inner dimension r of the factors."""

    def factors(self) -> tuple[Tensor, ...]:
        """Tall views that share memory with the parameters: A (..., d_out, r), B (..., d_in, r), or U, s (r), V."""

    def to_dense(self) -> Tensor:
        """W (..., d_out, d_in), merged in float64. For export and tests: forming it undoes the saving."""

    def gemms(self) -> list[Gemm]:
        """Every matmul of one forward pass. FLOPs are derived from this list and nowhere else."""

    def spectrum(self) -> Tensor:
        """The r leading singular values of W (..., r), descending, found without forming W."""

    def resize(self, rank: int, generator: torch.Generator | None = None) -> list[Resized]:
        """Another rank, in place; W changes by no more than the energy that is dropped. What became of which column.

        The generator draws new directions where the rank grows.
        """

    def reshape(self, rank: int) -> list[Resized]:
        """Another rank for numbers that are loaded next."""


def factor_layers(model: nn.Module) -> dict[str, Any]:
    """The factor layers of a model, each once, by first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorLayer)}


def factor_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The halves `up` and `down` of all factor layers that are linear modules, by name; stacks of experts are none."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, FactorLayer)]
    halves = {f"{name}.{side}": getattr(layer, side, None) for name, layer in layers for side in ("up", "down")}
    return {name: half for name, half in halves.items() if isinstance(half, nn.Linear)}


class UnformedWeight(Tensor):
    """Shape, dtype and device of a W that is nowhere in memory, for code that asks a linear for them (T5 does).

    Args:
        shape: (d_out, d_in). like: of the same dtype and device.

    Whatever computes with it raises a TypeError: code that reads a linear's weight instead of calling the linear
    would miss the factors.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: Tensor) -> Self:
        made: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(
            f"{function} wants the dense weight of a factor layer, which is never formed: this module reads weights of "
            "its linears instead of calling them, so exclude these from factorization"
        )


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest float of a device: float64, which only MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def merge(A: Tensor, B: Tensor) -> Tensor:
    """W = A B^T, summed in float64 and rounded once to the factors' dtype.

    A stack is merged one matrix at a time, so the float64 transient is one matrix, not all experts.
    """
    if A.ndim > 2:
        return torch.stack([merge(a, b) for a, b in zip(A, B, strict=True)])
    wide = wide_dtype(A.device)
    return (A.to(wide) @ B.to(wide).mT).to(A.dtype)
