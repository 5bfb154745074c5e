"""Which weights of a model are hidden matrices, and what names mean.

A hidden matrix is the weight of an `nn.Linear` or a transformers `Conv1D`, or a stacked expert parameter
(E, d_out, d_in). Embeddings and output heads are not: those of transformers models (wherever they sit in the tree) are
told by identity through `get_input_embeddings` and `get_output_embeddings`, and so is any linear that shares its weight
with an `nn.Embedding`; heads of classifiers are the linears beside the backbone with one output per label; tables of
positions that are bare parameters are told by their name. Modules inside a factor layer are factors and not matrices.

Patterns of names: see `nativerank.layers.patterns`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nativerank.layers.base import FactorLayer
from nativerank.layers.experts import check_experts, expert_projections
from nativerank.layers.initialize import dense_init
from nativerank.layers.lowrank import is_conv1d
from nativerank.layers.patterns import Patterns, as_patterns, match_all

POSITIONS = re.compile(r"(^|_)pos(ition(al|s)?)?(_|$)")  # position_embeddings, pos_embed, ...
LARGE_SHARE = 0.01  # of all parameters; a weight above it may not stay dense unnoticed


@dataclass(frozen=True)
class Slot:
    """One place in the module tree: `parent.<child>` is the module called `name`."""

    name: str
    parent: nn.Module | None
    child: str
    module: nn.Module


@dataclass(frozen=True)
class Matrix:
    """A dense hidden matrix W (d_out, d_in), or a stack of them.

    Args:
        name: of the module, or of the parameter of an expert stack; the first in model order if there are several.
        names: all of them; several when modules or parameters are shared.
        owners: the distinct modules that hold the parameter (one, unless linears are tied).
        parameter: its attribute there.
        kind: "linear", "conv1d" (stored as W^T) or "experts" (E, d_out, d_in).
    """

    name: str
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    parameter: str
    kind: str

    @property
    def parameter_name(self) -> str:
        """The dotted name of the parameter, as `named_parameters` has it."""
        return self.name if self.kind == "experts" else f"{self.name}.{self.parameter}"

    @property
    def weight(self) -> Tensor:
        """The view (..., d_out, d_in) of the parameter, whatever its storage order."""
        weight = getattr(self.owners[0], self.parameter)
        return weight.mT if self.kind == "conv1d" else weight

    @property
    def d_in(self) -> int:
        """Length of what it maps."""
        return self.weight.shape[-1]

    @property
    def d_out(self) -> int:
        """Length of what it maps to."""
        return self.weight.shape[-2]

    @property
    def stack(self) -> int:
        """Number of matrices: the experts of a stack, else 1."""
        return self.weight.shape[0] if self.weight.ndim == 3 else 1

    @torch.no_grad()
    def init_dense(self, std: float, seed: int) -> None:
        """Fills W with iid normal numbers of this std, the very ones that `init_factor_layer` with the same name and
        seed truncates.
        """
        weights = [self.weight] if self.weight.ndim == 2 else list(self.weight)
        names = [self.name] if self.weight.ndim == 2 else [f"{self.name}.{e}" for e in range(self.stack)]
        for name, W in zip(names, weights, strict=True):
            W.copy_(dense_init(name, self.d_out, self.d_in, std, seed))


def walk(module: nn.Module, name: str = "", parent: nn.Module | None = None, child: str = "") -> Iterator[Slot]:
    """Every place in the module tree, shared modules once per place; does not enter factor layers."""
    yield Slot(name, parent, child, module)
    if isinstance(module, FactorLayer):
        return
    for key, sub in module._modules.items():
        if sub is not None:
            yield from walk(sub, f"{name}.{key}" if name else key, module, key)


def linear_modules(model: nn.Module, include: Patterns = (), exclude: Patterns = ()) -> dict[str, Matrix]:
    """The hidden matrices that a method may own and that are dense now, by name in model order.

    Args:
        model: any module; it is not changed.
        include: only matrices matching one of these patterns (none: all).
        exclude: not those matching one of these.

    Raises:
        ValueError: a pattern matches nothing, or an expert stack has a layout that is not covered.
    """
    found = find_matrices(model)
    names = {name: m for m in found for name in m.names}
    kept = set(match_all(include, names, "include")) if as_patterns(include) else set(names)
    dropped = excluded_names(model, found, exclude)
    matrices = [m for m in found if kept.intersection(m.names) and not dropped.intersection(m.names)]
    for m in matrices:
        if m.kind == "experts":
            check_experts(m.owners[0], m.name.rpartition(".")[0])
    return {m.name: m for m in matrices}


def matrix_parameters(model: nn.Module, include: Patterns = (), exclude: Patterns = ()) -> list[str]:
    """Names of the parameters of a model's dense hidden matrices, as `named_parameters` has them; include and exclude
    as in `linear_modules`."""
    return [m.parameter_name for m in linear_modules(model, include, exclude).values()]


def find_matrices(model: nn.Module) -> list[Matrix]:
    """Every dense hidden matrix of a model, each parameter once, expert layouts not yet judged."""
    protected = {id(p) for p in embedding_parameters(model)}
    found: dict[int, Matrix] = {}
    for slot in walk(model):
        for name, attribute, kind in _matrix_attributes(slot):
            parameter = getattr(slot.module, attribute)
            if id(parameter) in protected:
                continue
            known = found.get(id(parameter))
            names = (*known.names, name) if known else (name,)
            owners = known.owners if known else ()
            if not any(owner is slot.module for owner in owners):
                owners = (*owners, slot.module)
            found[id(parameter)] = Matrix(names[0], names, owners, attribute, kind)
    return list(found.values())


def _matrix_attributes(slot: Slot) -> Iterator[tuple[str, str, str]]:
    """(matrix name, attribute, kind) of the hidden matrices that one module holds itself."""
    module = slot.module
    for projection in expert_projections(module):
        yield f"{slot.name}.{projection}" if slot.name else projection, projection, "experts"
    # nn.MultiheadAttention reads out_proj.weight instead of calling out_proj, so it cannot be replaced.
    if slot.parent is None or isinstance(slot.parent, nn.MultiheadAttention):
        return
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return
    if is_conv1d(module):
        yield slot.name, "weight", "conv1d"
    elif isinstance(module, nn.Linear) and weight.shape == (module.out_features, module.in_features):
        yield slot.name, "weight", "linear"


def embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights of embeddings and output heads, which stay dense and are told by identity."""
    modules: list[nn.Module | None] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            modules.append(module)
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            modules.append(_ask(module, getter))
        modules.extend(_classifiers(module))
    tables = [p for m in model.modules() for key, p in m._parameters.items() if p is not None and POSITIONS.search(key)]
    return [p for m in modules if isinstance(m, nn.Module) for p in m.parameters()] + tables


def _classifiers(module: nn.Module) -> Iterator[nn.Module]:
    """The linears with one output per label that a transformers model has beside its backbone."""
    backbone, config = getattr(module, "base_model", None), getattr(module, "config", None)
    labels = getattr(config, "num_labels", None)
    if labels is None or not isinstance(backbone, nn.Module) or backbone is module:
        return
    inside = {id(m) for m in backbone.modules()}
    for m in module.modules():
        if isinstance(m, nn.Linear) and m.out_features == labels and id(m) not in inside:
            yield m


def _ask(module: nn.Module, getter: str) -> nn.Module | None:
    """What a transformers model says; some heads and towers have no embeddings and raise."""
    if not callable(getattr(module, getter, None)):
        return None
    try:
        return getattr(module, getter)()
    except (NotImplementedError, AttributeError):
        return None


def _other_weights(model: nn.Module, matrices: Iterable[Matrix]) -> dict[str, nn.Parameter]:
    """Parameters of two or more dimensions that are neither hidden matrices, nor factors, nor embeddings."""
    known = {id(p) for p in embedding_parameters(model)} | {id(getattr(m.owners[0], m.parameter)) for m in matrices}
    others = {}
    for slot in walk(model):
        if isinstance(slot.module, FactorLayer):
            continue
        for key, parameter in slot.module._parameters.items():
            if parameter is not None and parameter.ndim > 1 and id(parameter) not in known:
                others[f"{slot.name}.{key}" if slot.name else key] = parameter
    return others


def excluded_names(model: nn.Module, matrices: Iterable[Matrix], exclude: Patterns) -> set[str]:
    """Everything the patterns take out: matrices, and other weights by their own or their module's name."""
    others = _other_weights(model, matrices)
    modules = (name.rpartition(".")[0] for name in others)
    hits = set(match_all(exclude, [*(n for m in matrices for n in m.names), *others, *modules], "exclude"))
    return hits | {name for name in others if name.rpartition(".")[0] in hits}


def check_nothing_large_stays(model: nn.Module, exclude: Patterns) -> None:
    """Raises a ValueError if a weight that cannot be factorized is above 1% of all parameters and not excluded."""
    matrices = find_matrices(model)
    excluded = excluded_names(model, matrices, exclude)
    total = sum(p.numel() for p in model.parameters())
    large = [
        f"{name} ({parameter.numel() / total:.1%})"
        for name, parameter in _other_weights(model, matrices).items()
        if parameter.numel() > LARGE_SHARE * total and name not in excluded
    ]
    if large:
        raise ValueError(
            f"{len(large)} weights above {LARGE_SHARE:.0%} of all parameters are of no kind that can be factorized: "
            f"{', '.join(large[:5])}{', ...' if len(large) > 5 else ''}; exclude them by name if they shall stay dense"
        )
