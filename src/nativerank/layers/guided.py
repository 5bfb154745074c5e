"""Self-guided training: a dense guide that leads a factor layer for a while and then leaves.

    y = alpha W x + (1 - alpha) A B^T x,   W: (d_out, d_in) = guide,   alpha: 1 -> 0 along a cosine

Two published variants. `GuidedLinear` starts W as the product A B^T, so that the function at step 0 is the low-rank one
(Wei et al., NeurIPS 2024, arXiv 2406.16450); `DenseGuidedLinear` as the whole dense initialisation whose truncation
the factors are (as Spectron's authors ran it as their baseline). At alpha = 0 the guide is freed, its gradient and
optimizer state with it, and what remains is a `LowRankLinear`.

Stochastic guide: a layer computes W x with probability alpha and its low-rank branch alone otherwise, which halves the
guide's cost. The coin is a hash of (seed, step, layer), drawn once per optimizer step: micro-batches, recomputed
activations, resumed runs and all processes see the same one.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from nativerank.layers.base import Gemm, merge
from nativerank.layers.initialize import init_seed
from nativerank.layers.lowrank import LowRankLinear


class GuidedLinear(LowRankLinear):
    """Maps (..., d_in) to (..., d_out) through `rank` dimensions, beside a dense guide while there is one.

    In evaluation both branches are always mixed. Saved models know it as what it becomes, a `LowRankLinear`; the
    arguments (bias, device and dtype among them) are that class's.
    """

    wants_dense = False  # whether the guide starts as the dense initialisation instead of the product

    guide: nn.Parameter | None

    def _allocate(self, rank: int, bias: bool, device: torch.device, dtype: torch.dtype | None) -> None:
        super()._allocate(rank, bias, device, dtype)
        self.guide = nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        self.alpha, self.active = 1.0, True

    @torch.no_grad()
    def fill(self, A: Tensor, B: Tensor) -> None:
        """Copies factors A (d_out, r) and B (d_in, r) into the parameters; the guide becomes their product."""
        super().fill(A, B)
        if self.guide is not None:
            self.fill_guide(merge(*self.factors()))

    @torch.no_grad()
    def fill_guide(self, W: Tensor) -> None:
        """Starts the guide as W (d_out, d_in)."""
        assert self.guide is not None
        self.guide.copy_(W)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        if self.guide is None or (self.training and not self.active):
            return super().forward(x)
        low_rank = self.up(self.inner(x))  # (..., d_out); the modules, which others may have wrapped
        return low_rank.lerp(linear(x, self.guide, self.up.bias), self.alpha)

    def free_guide(self) -> None:
        """Lets go of the guide for good; the layer is now its factors."""
        self.guide = None

    def allocate_guide(self) -> nn.Parameter:
        """An unfilled guide, for a run that goes back to a checkpoint which has one."""
        like = self.up.weight
        device = "meta" if isinstance(like, DTensor) else like.device  # sharded before it takes memory
        empty = torch.empty(self.out_features, self.in_features, dtype=like.dtype, device=device)
        self.guide = nn.Parameter(empty, requires_grad=like.requires_grad)
        return self.guide

    def share(self, other: Self) -> None:
        super().share(other)
        self.guide = other.guide

    def gemms(self) -> list[Gemm]:
        """Every matmul of one forward pass that computes the guide, as long as there is one."""
        return super().gemms() + ([] if self.guide is None else [self.guide_gemm()])

    def guide_gemm(self) -> Gemm:
        """What the guide adds to a forward pass in which it is computed."""
        return Gemm(self.in_features, self.out_features)


class DenseGuidedLinear(GuidedLinear):
    """The variant whose guide starts as the dense initialisation."""

    wants_dense = True


def guide_weight(step: int, guided_steps: int) -> float:
    """alpha after `step` updates: (1 + cos(pi step / guided_steps)) / 2, and 0 from guided_steps on."""
    return (1 + math.cos(math.pi * step / guided_steps)) / 2 if step < guided_steps else 0.0


def guide_coin(seed: int, step: int, name: str) -> float:
    """A number in [0, 1) that depends on nothing else; the guide of this layer is computed if it is below alpha."""
    return init_seed(seed, f"guide:{step}:{name}") / 2**63


Reshaped = Callable[[list[str]], AbstractContextManager[Any]]


class Owner(Protocol):
    """The optimizer, as far as guides need it: it lets go of parameters, and takes them up again."""

    def release(self, group: str) -> None: ...

    def adopt(self, group: str, parameters: list[tuple[str, nn.Parameter]]) -> None: ...


class Guides:
    """All guides of a model, brought to the state that belongs to a step.

    Args:
        model: holds guided layers; one whose guides are gone, which was loaded so, is at the end.
        owner: optimizer with the guides' parameters in the group GROUP.
        guided_steps: updates after which the guides are gone.
        seed: of the coins.
        stochastic: False computes every guide at every step.
        reshaped: a context in which the parameters with these names may be freed, and others come.

    Raises:
        ValueError: guided_steps below 0.
    """

    GROUP = "guides"

    def __init__(
        self,
        model: nn.Module,
        owner: Owner,
        guided_steps: int,
        seed: int = 0,
        stochastic: bool = True,
        reshaped: Reshaped = nullcontext,
    ):
        if guided_steps < 0:
            raise ValueError(f"guided_steps must be at least 0, got {guided_steps}")
        self.layers: dict[str, Any] = guided_layers(model)
        self.owner, self.guided_steps, self.seed, self.stochastic = owner, guided_steps, seed, stochastic
        self.reshaped = reshaped
        self.step, self.alpha = 0, 1.0
        gone = self.layers and all(layer.guide is None for layer in self.layers.values())
        self.set(guided_steps if gone else 0)

    def set(self, step: int) -> None:
        """alpha and coins for the forward passes after `step` updates; frees the guides, or brings them back unfilled.

        Before a checkpoint is loaded, set its step: then the model has exactly the tensors that it holds.
        """
        self.step, self.alpha = step, guide_weight(step, self.guided_steps)
        present = [layer for layer in self.layers.values() if layer.guide is not None]
        if self.alpha == 0:
            if present:
                with self.reshaped([f"{name}.guide" for name in self.layers]):
                    for layer in self.layers.values():
                        layer.free_guide()
                    self.owner.release(self.GROUP)
            return
        if not present:
            with self.reshaped([]):
                guides = [(f"{name}.guide", layer.allocate_guide()) for name, layer in self.layers.items()]
                self.owner.adopt(self.GROUP, guides)
        for name, layer in self.layers.items():
            layer.alpha = self.alpha
            layer.active = not self.stochastic or guide_coin(self.seed, step, name) < self.alpha


def guided_layers(model: nn.Module) -> dict[str, Any]:
    """The modules of a model that have, or had, a guide."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "free_guide")}
