"""Surgery on any nn.Module: dense matrices out, factor layers in, and back.

    factorize_modules(model)   nn.Linear, Conv1D, expert stacks  ->  factors, in place
    to_dense_modules(model)    factors  ->  exactly the modules that were there, W = A B^T merged in float64

The whole plan (which matrices, which ranks, what must not stay dense) is made and checked before anything changes, so
an error of the user leaves the model as it was. Then one matrix at a time is truncated and freed: the transient is the
SVD of the largest matrix. On the meta device only shapes change, which takes seconds for any size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
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
from nativerank.layers.initialize import named_generator, sampled_factors
from nativerank.layers.lowrank import LowRankLinear
from nativerank.layers.patterns import Patterns, as_patterns
from nativerank.layers.plan import ByEnergy, plan_ranks
from nativerank.layers.pretrained import check_no_adapters, mark_factored, unmark
from nativerank.layers.rank import rank_warning
from nativerank.layers.report import FactorizeEntry, FactorizeReport, fused_parts
from nativerank.layers.spectral import SpectralLinear
from nativerank.linalg.energy import kept_energy
from nativerank.linalg.truncate import Decomposition, decompose


class LayerKind(NamedTuple):
    """The classes that hold one matrix and a stack of expert matrices (None: not covered)."""

    linear: Any
    experts: Any


KINDS = {
    "lowrank": LayerKind(LowRankLinear, LowRankExperts),
    "spectral": LayerKind(SpectralLinear, None),
    "guided": LayerKind(GuidedLinear, None),
    "guided-dense": LayerKind(DenseGuidedLinear, None),
}
INITS = ("svd", "sampled", "flat", None)


def factorize_modules(
    model: nn.Module,
    *,
    kind: str = "lowrank",
    ratio: float | None = None,
    value: int | None = None,
    energy: float | None = None,
    rule: str = "auto",
    include: Patterns = (),
    exclude: Patterns = (),
    overrides: Mapping[str, int] | None = None,
    init: str | None = "svd",
    seed: int = 0,
    require_all: bool = True,
    progress: Callable[[str, int, int], None] = lambda name, number, total: None,
) -> FactorizeReport:
    """Replaces the hidden matrices of a model by factors, in place.

    Args:
        model: any module, also on the meta device. Embeddings and output heads stay.
        kind: which layer holds the factors.
        ratio, value, rule: rank by ratio and rule, or one rank for all; see `nativerank.layers.rank`.
        energy: the smallest rank that keeps this share of ||W||_F^2, per matrix, at most `value` if both are given; of
            a Gaussian matrix where the weights are not truncated; see `nativerank.layers.plan`.
        include: only matrices matching one of these patterns (none: all).
        exclude: what matches one of these stays dense.
        overrides: pattern -> rank; the first pattern that matches a matrix decides.
        init: "svd" truncates the present weight, "sampled" draws factors with the spectrum of a Gaussian matrix of the
            present weight's scale, "flat" with equal singular values and its norm, None fills with NaN for weights that
            are loaded next. Nothing on the meta device.
        seed: of the sampled numbers.
        require_all: refuse to leave a weight above 1% of all parameters dense unless it is excluded by name. Naming
            what to factorize by `include` leaves the rest dense on purpose.
        progress: called with name, number (from 0) and count of the matrices, before each.

    Raises:
        ValueError: nothing to factorize, a pattern without a match, a rank out of bounds, a large weight left over.
    """
    include, exclude = as_patterns(include), as_patterns(exclude)
    if kind not in KINDS or init not in INITS:
        raise ValueError(
            f"unknown {kind=} or {init=}; known kinds: {', '.join(KINDS)}; inits: svd, sampled, flat, None"
        )
    matrices = linear_modules(model, include, exclude)
    if not matrices:
        raise ValueError(f"found no dense linear layer to factorize in {type(model).__name__}")
    if require_all and not include:
        check_nothing_large_stays(model, exclude)
    stacks = [name for name, m in matrices.items() if m.kind == "experts"]
    if stacks and KINDS[kind].experts is None:
        raise ValueError(f"{kind} layers do not cover stacks of experts such as {stacks[0]}; exclude them by name")
    ranks = plan_ranks(
        matrices, ratio=ratio, value=value, energy=energy, rule=rule, overrides=overrides, weights=init == "svd"
    )
    if init is not None:
        check_finite(matrices)
    surgeon = _Surgeon(model, KINDS[kind], init, seed)
    before = _num_parameters(model)
    entries = []
    for number, (name, matrix) in enumerate(matrices.items()):
        progress(name, number, len(matrices))
        entries.append(surgeon.replace(matrix, ranks[name]))
    mark_factored(model)
    return FactorizeReport(tuple(entries), before, _num_parameters(model))


def check_finite(matrices: Mapping[str, Matrix]) -> None:
    """Refuses weights that cannot be truncated, before any of them is replaced."""
    for name, matrix in matrices.items():
        if matrix.weight.device.type != "meta" and not bool(torch.isfinite(matrix.weight).all()):
            raise ValueError(f"{name} holds NaN or infinity, so it cannot be factorized")


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

    def replace(self, matrix: Matrix, rank: int | ByEnergy) -> FactorizeEntry:
        """Puts factors into every place of one matrix."""
        W, d_in, d_out, stack = matrix.weight.detach(), matrix.d_in, matrix.d_out, matrix.stack
        owner_type = type(matrix.owners[0]).__name__
        found: list[Decomposition] = []
        if isinstance(rank, ByEnergy):
            found = [decompose(W_e) for W_e in _blocks(W)]
            rank = rank.rank(torch.stack([f.spectrum for f in found]))
        layer: Any = self._swap_experts(matrix, rank) if matrix.kind == "experts" else self._swap_linears(matrix, rank)
        kept = self._fill(layer, W, matrix.name, found) if W.device.type != "meta" else None
        return FactorizeEntry(
            name=matrix.name,
            kind=owner_type,
            d_in=d_in,
            d_out=d_out,
            rank=rank,
            stack=stack,
            params_before=W.numel(),
            params_after=sum(factor.numel() for factor in layer.factors()),
            warning=rank_warning(rank, d_in, d_out) or self._zero_warning(layer),
            fused=fused_parts(matrix.name),
            kept_energy=kept,
        )

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
    def _fill(self, layer: Any, W: Tensor, name: str, found: list[Decomposition]) -> float | None:
        """Fills the factors, from the decompositions where there are some; the energy that a truncation keeps."""
        if self.init is None:
            for factor in layer.factors():
                factor.fill_(torch.nan)
            return None
        spectra = []
        for e, W_e in enumerate(_blocks(W)):
            label, where = (name, {}) if W.ndim == 2 else (f"{name}.{e}", {"expert": e})
            if self.init == "svd":
                known = found[e] if found else decompose(W_e)
                spectra.append(known.spectrum)
                layer.fill(*known.factors(layer.rank), **where)
            else:
                layer.fill(*self._random_factors(W_e, layer.rank, label), **where)
        if getattr(layer, "wants_dense", False):
            layer.fill_guide(W)
        return kept_energy(torch.stack(spectra), layer.rank) if spectra else None

    def _random_factors(self, W: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
        std, generator = W.float().square().mean().sqrt().item(), named_generator(self.seed, name)
        return sampled_factors(W.shape[1], W.shape[0], rank, std, generator, W.device, self.init == "flat")

    def _zero_warning(self, layer: Any) -> str | None:
        """Two zero factors get no gradient from each other, so a zero weight would stay zero for good."""
        known = self.init is not None and layer.factors()[0].device.type != "meta"
        stuck = known and not any(bool(factor.any()) for factor in layer.factors())
        return "the weight is zero, and so are its factors: they can never learn" if stuck else None


def to_dense_modules(model: nn.Module, where: Callable[[Any], bool] = lambda layer: True) -> list[str]:
    """Puts back the dense modules that `factorize_modules` replaced, in place; returns the names that changed.

    Args:
        model: factorized.
        where: which of its factor layers, each asked by itself; the others stay factored.

    Raises:
        ValueError: adapters that are not merged.
    """
    check_no_adapters(model)
    changed: list[str] = []
    done: dict[int, nn.Module | nn.Parameter] = {}
    tied: dict[int, nn.Parameter] = {}
    merged = [slot for slot in _factor_slots(model) if where(slot.module)]
    for slot in merged:
        layer: Any = slot.module
        assert slot.parent is not None, "the model itself is a factor layer and cannot be replaced in place"
        if id(layer) not in done:
            done[id(layer)] = dense = layer.restore()
            if isinstance(dense, nn.Module):  # layers that share their factors get one weight again
                dense.weight = tied.setdefault(id(layer.up.weight), dense.weight)  # type: ignore[arg-type]
            changed.append(slot.name)
        setattr(slot.parent, slot.child, done[id(layer)])
    still_ours = {id(config) for _, config in _expert_stacks(_factor_slots(model))}
    for stack, config in _expert_stacks(merged):
        if id(config) not in still_ours:
            config._experts_implementation = stack.previous_implementation
    unmark(model)
    return changed


def _expert_stacks(slots: Iterable[Slot]) -> list[tuple[Any, Any]]:
    """The stacks of experts among these, each with the config that names the implementation it needs."""
    found: list[tuple[Any, Any]] = [(slot.module, slot.parent) for slot in slots]
    return [(stack, parent.config) for stack, parent in found if hasattr(stack, "previous_implementation")]


def _factor_slots(model: nn.Module) -> Iterator[Slot]:
    return (slot for slot in walk(model) if isinstance(slot.module, FactorLayer) and hasattr(slot.module, "restore"))


def _blocks(W: Tensor) -> list[Tensor]:
    """The matrices of a stack, or the one that there is."""
    return [W] if W.ndim == 2 else list(W)


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
