"""Surgery on any nn.Module: dense matrices out, factor layers in, and back.

    factorize_modules(model)   nn.Linear, Conv1D, expert stacks  ->  factors, in place
    to_dense_modules(model)    factors  ->  exactly the modules that were there, W = A B^T merged in float64

The whole plan (which matrices, which ranks, what must not stay dense) is made and checked before anything changes, so
an error of the user leaves the model as it was. Then one matrix at a time is truncated and freed: the transient is the
SVD of the largest matrix. On the meta device only shapes change, which takes seconds for any size.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nativerank.layers.base import FactorLayer
from nativerank.layers.discover import (
    Matrix,
    Slot,
    check_nothing_large_stays,
    linear_modules,
    walk,
)
from nativerank.layers.experts import IMPLEMENTATION, LowRankExperts, register_implementation
from nativerank.layers.guided import DenseGuidedLinear, GuidedLinear
from nativerank.layers.initialize import named_generator, sampled_factors, truncated_svd
from nativerank.layers.lowrank import LowRankLinear
from nativerank.layers.patterns import Patterns, as_patterns, match_all
from nativerank.layers.rank import DEFAULT_RATIO, check_rank, rank_from_ratio, rank_warning
from nativerank.layers.report import FactorizeEntry, FactorizeReport, fused_parts


class LayerKind(NamedTuple):
    """The classes that hold one matrix and a stack of expert matrices (None: not covered)."""

    linear: Any
    experts: Any


KINDS = {
    "lowrank": LayerKind(LowRankLinear, LowRankExperts),
    "guided": LayerKind(GuidedLinear, None),
    "guided-dense": LayerKind(DenseGuidedLinear, None),
}
INITS = ("svd", "sampled", None)


def factorize_modules(
    model: nn.Module,
    *,
    kind: str = "lowrank",
    ratio: float | None = None,
    value: int | None = None,
    rule: str = "auto",
    include: Patterns = (),
    exclude: Patterns = (),
    overrides: Mapping[str, int] | None = None,
    init: str | None = "svd",
    seed: int = 0,
    require_all: bool = True,
) -> FactorizeReport:
    """Replaces the hidden matrices of a model by factors, in place.

    Args:
        model: any module, also on the meta device. Embeddings and output heads stay.
        kind: which layer holds the factors.
        ratio, value, rule: rank by ratio and rule, or one rank for all; see `nativerank.layers.rank`.
        include: only matrices matching one of these patterns (none: all).
        exclude: what matches one of these stays dense.
        overrides: pattern -> rank; the first pattern that matches a matrix decides.
        init: "svd" truncates the present weight, "sampled" draws factors with the spectrum of a Gaussian matrix of the
            present weight's scale, None fills with NaN for weights that are loaded next. Nothing on the meta device.
        seed: of the sampled numbers.
        require_all: refuse to leave a weight above 1% of all parameters dense unless it is excluded by name. Naming
            what to factorize by `include` leaves the rest dense on purpose.

    Raises:
        ValueError: nothing to factorize, a pattern without a match, a rank out of bounds, a large weight left over.
    """
    include, exclude = as_patterns(include), as_patterns(exclude)
    if kind not in KINDS or init not in INITS:
        raise ValueError(f"unknown {kind=} or {init=}; known kinds: {', '.join(KINDS)}; inits: svd, sampled, None")
    matrices = linear_modules(model, include, exclude)
    if not matrices:
        raise ValueError(f"found no dense linear layer to factorize in {type(model).__name__}")
    if require_all and not include:
        check_nothing_large_stays(model, exclude)
    stacks = [name for name, m in matrices.items() if m.kind == "experts"]
    if stacks and KINDS[kind].experts is None:
        raise ValueError(f"{kind} layers do not cover stacks of experts such as {stacks[0]}; exclude them by name")
    ranks = plan_ranks(matrices, ratio, value, rule, overrides or {})
    if init is not None:
        check_finite(matrices)
    surgeon = _Surgeon(model, KINDS[kind], init, seed)
    before = _num_parameters(model)
    entries = tuple(surgeon.replace(matrix, ranks[name]) for name, matrix in matrices.items())
    return FactorizeReport(entries, before, _num_parameters(model))


def check_finite(matrices: Mapping[str, Matrix]) -> None:
    """Refuses weights that cannot be truncated, before any of them is replaced."""
    for name, matrix in matrices.items():
        if matrix.weight.device.type != "meta" and not bool(torch.isfinite(matrix.weight).all()):
            raise ValueError(f"{name} holds NaN or infinity, so it cannot be factorized")


def plan_ranks(
    matrices: Mapping[str, Matrix], ratio: float | None, value: int | None, rule: str, overrides: Mapping[str, int]
) -> dict[str, int]:
    """The rank of every matrix, all explicit ranks checked."""
    if ratio is not None and value is not None:
        raise ValueError(f"give a rank ratio or a rank value, not both: ratio {ratio}, value {value}")
    all_names = {alias: name for name, m in matrices.items() for alias in m.names}
    explicit: dict[str, int] = {}
    for pattern, override in overrides.items():
        for alias in match_all(pattern, all_names, "override"):
            explicit.setdefault(all_names[alias], override)
    ranks = {}
    for name, m in matrices.items():
        rank: int | None = explicit.get(name, value)
        if rank is None:
            rank = rank_from_ratio(DEFAULT_RATIO if ratio is None else ratio, m.d_in, m.d_out, rule)
        check_rank(rank, m.d_in, m.d_out, name)
        ranks[name] = rank
    return ranks


class _Surgeon:
    """Replaces matrices one by one; knows every place where a module stands."""

    def __init__(self, model: nn.Module, kind: LayerKind, init: str | None, seed: int):
        self.kind, self.init, self.seed = kind, init, seed
        self.slots: dict[int, list[Slot]] = {}
        self.previous: dict[int, str | None] = {}  # id of a config -> its experts implementation before us
        for slot in walk(model):
            self.slots.setdefault(id(slot.module), []).append(slot)
            if hasattr(slot.module, "previous_implementation"):
                parent: Any = slot.parent
                self.previous[id(parent.config)] = slot.module.previous_implementation  # type: ignore[assignment]

    def replace(self, matrix: Matrix, rank: int) -> FactorizeEntry:
        """Puts factors into every place of one matrix."""
        W, owner_type = matrix.weight.detach(), type(matrix.owners[0]).__name__
        entry = FactorizeEntry(
            name=matrix.name,
            kind=owner_type,
            d_in=matrix.d_in,
            d_out=matrix.d_out,
            rank=rank,
            stack=matrix.stack,
            params_before=W.numel(),
            params_after=matrix.stack * rank * (matrix.d_in + matrix.d_out),
            warning=rank_warning(rank, matrix.d_in, matrix.d_out) or self._zero_warning(W),
            fused=fused_parts(matrix.name),
        )
        layer = self._swap_experts(matrix, rank) if matrix.kind == "experts" else self._swap_linears(matrix, rank)
        if W.device.type != "meta":
            self._fill(layer, W, matrix.name)
        return entry

    def _swap_linears(self, matrix: Matrix, rank: int) -> nn.Module:
        layers = []
        for owner in matrix.owners:
            layer = self.kind.linear.replacing(owner, rank)
            for slot in self.slots[id(owner)]:
                setattr(slot.parent, slot.child, layer)
            layers.append(layer)
        for layer in layers[1:]:
            layer.share(layers[0])
        return layers[0]

    def _swap_experts(self, matrix: Matrix, rank: int) -> nn.Module:
        stack = self.kind.experts.replacing(matrix.owners[0], matrix.parameter, rank)
        for owner in matrix.owners:
            config: Any = owner.config
            stack.previous_implementation = self.previous.setdefault(id(config), config._experts_implementation)
            delattr(owner, matrix.parameter)  # a module may not be assigned over a parameter
            setattr(owner, matrix.parameter, stack)
            register_implementation()
            config._experts_implementation = IMPLEMENTATION
        return stack

    @torch.no_grad()
    def _fill(self, layer: Any, W: Tensor, name: str) -> None:
        if self.init is None:
            for factor in layer.factors():
                factor.fill_(torch.nan)
        elif W.ndim == 2:
            layer.fill(*self._factors(W, layer.rank, name))
            if getattr(layer, "wants_dense", False):
                layer.fill_guide(W)
        else:
            for expert, W_e in enumerate(W):
                layer.fill(*self._factors(W_e, layer.rank, f"{name}.{expert}"), expert=expert)

    def _factors(self, W: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
        if self.init == "svd":
            return truncated_svd(W, rank)
        std = W.float().square().mean().sqrt().item()
        return sampled_factors(W.shape[1], W.shape[0], rank, std, named_generator(self.seed, name), W.device)

    def _zero_warning(self, W: Tensor) -> str | None:
        """Two zero factors get no gradient from each other, so a zero weight would stay zero for good."""
        zero = self.init is not None and W.device.type != "meta" and not W.any()
        return "the weight is zero, and so are its factors: they can never learn" if zero else None


def to_dense_modules(model: nn.Module) -> list[str]:
    """Puts back the dense modules that `factorize_modules` replaced, in place; returns the names that changed."""
    changed: list[str] = []
    done: dict[int, nn.Module | nn.Parameter] = {}
    tied: dict[int, nn.Parameter] = {}
    for slot in list(_factor_slots(model)):
        layer: Any = slot.module
        assert slot.parent is not None, "the model itself is a factor layer and cannot be replaced in place"
        if id(layer) not in done:
            done[id(layer)] = dense = layer.restore()
            if isinstance(dense, nn.Module):  # layers that share their factors get one weight again
                dense.weight = tied.setdefault(id(layer.up.weight), dense.weight)  # type: ignore[arg-type]
            changed.append(slot.name)
        setattr(slot.parent, slot.child, done[id(layer)])
        if hasattr(layer, "previous_implementation"):
            config: Any = slot.parent.config
            config._experts_implementation = layer.previous_implementation
    return changed


def _factor_slots(model: nn.Module) -> Iterator[Slot]:
    return (slot for slot in walk(model) if isinstance(slot.module, FactorLayer) and hasattr(slot.module, "restore"))


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
