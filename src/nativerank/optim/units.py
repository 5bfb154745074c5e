"""What is updated together, and where: a matrix, a pair of factors, or a pair with its s.

here    every process does all of it: one process, or parameters that are not spread and not meant to be
owner   one process has a whole copy of the weights and the whole state and runs the ordinary rule; gradients come
        to it and weights go out
gram    every process updates its rows; r x r problems are solved by the owner (`optim.gram_rules`)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import cut_along
from nativerank.optim.rules import RULES

HERE, OWNER, GRAM = "here", "owner", "gram"
ALGEBRAS = ("auto", GRAM, OWNER)


@dataclass(eq=False)
class Unit:
    """Members of one group, from place `start` on; `owner` is a rank of the grid."""

    group: int
    start: int
    members: list[Tensor]
    algebra: str = HERE
    owner: int = 0


def units_of(groups: Sequence[dict[str, Any]]) -> list[Unit]:
    """The units of all groups but those of AdamW, which goes element by element."""
    found = []
    for index, group in enumerate(groups):
        rule = RULES[group["rule"]]
        if rule.kind != "elementwise":
            for start in range(0, len(group["params"]), rule.width):
                found.append(Unit(index, start, group["params"][start : start + rule.width]))
    return found


def turned(position: int, member: Tensor, rule: str) -> bool:
    """Whether the tall matrix that row shards are rows of is the transpose of the parameter."""
    if RULES[rule].kind == "matrix":
        return member.shape[-2] < member.shape[-1]
    return position == 1


def in_rows(unit: Unit, rule: str) -> bool:
    """Whether every member lies in row shards of its tall matrix, or whole, on every process."""
    for position, member in enumerate(unit.members):
        along = cut_along(member)
        if position < 2 and along is not None and (member.dim() != 2 or along != int(turned(position, member, rule))):
            return False
        if position < 2 and member.dim() != 2:
            return False
    return True


def flops(unit: Unit) -> int:
    """About what an update of the unit costs its owner: d r^2 and 13 r x r products."""
    total = 0
    for member in unit.members[:2]:
        d, r = max(member.shape[-2:]), min(member.shape[-2:])
        batch = member.numel() // max(1, d * r)
        total += batch * (13 * 2 * r**3 + (0 if unit.algebra == GRAM else 4 * d * r * r))
    return total


def assign(units: Sequence[Unit], grid: Grid, choose: Callable[[Unit], str]) -> None:
    """Decides algebra and owner of every unit, alike on all processes: the largest first, to whoever has least."""
    for unit in units:
        unit.algebra = choose(unit)
    load = [0] * grid.world
    for unit in sorted(units, key=flops, reverse=True):
        unit.owner = min(range(grid.world), key=load.__getitem__)
        load[unit.owner] += max(1, flops(unit))
