"""What each parameter is to an optimizer: half of a factor pair, a dense hidden matrix, or auxiliary.

    factor     `up` (d_out, r) and `down` (r, d_in) of a module with `factors()`, and `s` (r) where it has one: one
               matrix W, so always together
    matrix     a dense hidden matrix, where the method wants those
    guide      the dense matrix beside a factor pair in self-guided training, as long as it is there
    auxiliary  everything else: embedding, head, norms, biases, routers

Neither the number of dimensions nor the module type tells these apart (an embedding is 2-D, a factor is the weight
of an nn.Linear), so pairs come from the layer protocol and dense matrices by name from whoever looked for them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class Pair:
    """The parameters of one W: up is A or U (..., d_out, r), down is B^T or V^T (..., r, d_in), s (..., r) or None."""

    name: str
    up: Named
    down: Named
    s: Named | None = None

    @property
    def members(self) -> tuple[Named, ...]:
        """All its parameters, in the order in which the optimizer takes them."""
        return (self.up, self.down) if self.s is None else (self.up, self.down, self.s)


@dataclass
class Roles:
    """Every trainable parameter of a model, each exactly once."""

    pairs: list[Pair] = field(default_factory=list)
    matrices: list[Named] = field(default_factory=list)
    guides: list[Named] = field(default_factory=list)
    auxiliary: list[Named] = field(default_factory=list)

    @property
    def hidden(self) -> list[Named]:
        """What the method's own rule moves: both halves of all pairs, or the dense matrices."""
        return [member for pair in self.pairs for member in pair.members] or self.matrices


def long_sides(roles: Roles) -> dict[int, int]:
    """{id(parameter): dimension} along which many processes share it: of a factor the long one, so that every process
    sees its r columns; of a dense matrix the longer one; 0, and not named, for the rest and for stacks of experts."""
    factors = {id(pair.down[1]): 1 for pair in roles.pairs if pair.down[1].dim() == 2}
    dense = [p for _, p in (*roles.matrices, *roles.guides) if p.dim() == 2]
    return factors | {id(p): 1 for p in dense if p.shape[1] > p.shape[0]}


def _weight(half: Any) -> nn.Parameter:
    """A factor is the weight of an nn.Linear, or a bare parameter in a stack of experts."""
    weight: nn.Parameter = getattr(half, "weight", half)
    return weight


def members_of(module: Any) -> list[nn.Parameter]:
    """The parameters of a factor module: up, down, and s where it has one."""
    return [_weight(half) for half in (module.up, module.down, getattr(module, "s", None)) if half is not None]


def assign_roles(model: nn.Module, matrices: Iterable[str] = ()) -> Roles:
    """Sorts the trainable parameters of a model.

    Args:
        model: any module, factorized or not.
        matrices: names of the dense parameters to be treated as hidden matrices.

    Raises:
        ValueError: a parameter claimed twice, half a pair frozen, or a name that is no parameter.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    roles, taken = Roles(), set()

    def claim(parameter: nn.Parameter) -> Named:
        name = names[id(parameter)]
        if name in taken:
            raise ValueError(f"parameter {name} belongs to two groups")
        taken.add(name)
        return name, parameter

    for name, module in model.named_modules():
        if not callable(getattr(module, "factors", None)):  # the layer protocol
            continue
        members = members_of(module)
        if len({p.requires_grad for p in members}) > 1:
            raise ValueError(f"{name}: one factor is frozen and the other is not; a pair trains together or not at all")
        if members[0].requires_grad:
            roles.pairs.append(Pair(name, *map(claim, members)))
        if getattr(module, "guide", None) is not None and module.guide.requires_grad:
            roles.guides.append(claim(module.guide))
    for name in matrices:
        if name not in names.values():
            raise ValueError(f"{name} is not a parameter of the model")
        if name in trainable:
            roles.matrices.append(claim(trainable[name]))
    roles.auxiliary = [(n, p) for n, p in trainable.items() if n not in taken]
    return roles
