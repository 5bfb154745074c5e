"""FLOPs of an optimizer step: every update rule is run once per shape on the meta device, and what it does is counted.

| operation on (m, n), r x r | FLOPs | source |
|---|---|---|
| matrix products | multiply-add 2 | PyTorch's counter |
| Cholesky | r^3 / 3 | textbook (Golub and Van Loan), as all below |
| triangular solve, n right sides | r^2 n | |
| QR, Q formed; R alone | 4 m n^2 - 4/3 n^3; half of it | |
| symmetric eigenvalues; with vectors | 4/3 r^3; 9 r^3 | |
| singular values with vectors | 21 r^3 | |

Nothing is derived by hand per rule, so a rule that changes is counted as it is then. Elementwise work (AdamW, moments,
the subtraction of a step) is left out, as in `accounting.flops`; `r x r` work is done as a GPU would, by products. What
is read off values (a matrix that needs more care) takes the ordinary way.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nativerank.accounting.trace import OPTIMIZER, Op, Tracer
from nativerank.optim.directions import New, Stack, formed
from nativerank.optim.precision import kept_as, state_dtype
from nativerank.optim.rules import RULES, initial_state
from nativerank.optim.units import turned, units_of

Shape = tuple[int, ...]
NAMES_OF_GROUPS = ("params", "param_names", "name")  # what a rule does not read
_LOOKED_AT: dict[tuple[Any, str], list[Op]] = {}


def optimizer_flops(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """FLOPs of one step by rule, of all processes together.

    Args:
        groups: of the optimizer; parameters may lie on the meta device or in shards, whose whole shapes count.
    """
    shapes: Counter[tuple[int, tuple[Shape, ...]]] = Counter()
    for unit in units_of([dict(group) for group in groups]):
        shapes[unit.group, tuple(tuple(p.shape) for p in unit.members)] += 1
    found: dict[str, float] = {str(group["rule"]): 0.0 for group in groups}
    for (index, members), count in shapes.items():
        found[groups[index]["rule"]] += count * unit_flops(members, groups[index])
    return found


def optimizer_ops(groups: Sequence[Mapping[str, Any]], processes: int = 1, shards: int = 1) -> list[Op]:
    """The operators of one step on one process, with the bytes they read and write.

    Update rules of matrices are shared by all processes, AdamW runs where a weight or its shard is: one pass over
    weight, gradient and moments.
    """
    shapes: Counter[tuple[int, tuple[Shape, ...]]] = Counter()
    for unit in units_of([dict(group) for group in groups]):
        shapes[unit.group, tuple(tuple(p.shape) for p in unit.members)] += 1
    found: Counter[Op] = Counter()
    for (index, members), count in shapes.items():
        for op in unit_ops(members, groups[index]):
            found[replace(op, calls=1)] += int(op.calls) * count
    adamw = Counter(adamw_bytes(p, group) for group in groups for p in group["params"] if group["rule"] == "adamw")
    return [
        *(replace(op, calls=calls / processes) for op, calls in found.items()),
        *(Op(OPTIMIZER, "adamw", 0.0, touched, calls / shards) for touched, calls in adamw.items()),
    ]


def adamw_bytes(p: Any, group: Mapping[str, Any]) -> float:
    """Read and written once: weight and both moments both ways, the gradient one way."""
    moment = state_dtype(p, kept_as(p, group["state_dtype"])).itemsize
    return float(p.numel() * (3 * p.element_size() + 4 * moment))


def unit_ops(shapes: Sequence[Shape], options: Mapping[str, Any]) -> list[Op]:
    """The operators of one step of a unit, looked at once for these shapes and options; not to be changed."""
    own = {name: value for name, value in options.items() if name not in NAMES_OF_GROUPS}
    key = (tuple(shapes), repr(sorted(own.items())))
    if key not in _LOOKED_AT:
        _LOOKED_AT[key] = look_at(shapes, own)
    return _LOOKED_AT[key]


def look_at(shapes: Sequence[Shape], options: Mapping[str, Any]) -> list[Op]:
    """The operators of one step of a unit, the subtraction of the step included."""
    rule = RULES[options["rule"]]
    assert rule.update is not None
    sides = [stack_of(position, shape, options) for position, shape in enumerate(shapes)]
    held = [t for side in sides for t in (side.grad, *side.state.values())]
    tracer = Tracer(held, SOLVERS)
    with tracer, torch.no_grad():
        tracer.begin(OPTIMIZER)
        changed = rule.update(*sides, {**options, "initial_lr": options["lr"]})
        for side, change in zip(sides, changed if isinstance(changed, tuple) else (changed,), strict=False):
            if isinstance(change, New):
                side.weight.copy_(change.weight)
            elif side.stored is not None:
                side.weight.sub_(formed(change))
    return tracer.ops


def unit_flops(shapes: Sequence[Shape], options: Mapping[str, Any]) -> float:
    """FLOPs of one step of a unit: a matrix (rows, cols), or factors as they are stored, with their s."""
    return float(sum(op.calls * op.flops for op in unit_ops(shapes, options)))


def stack_of(position: int, shape: Shape, options: Mapping[str, Any]) -> Stack:
    """One parameter and its state without numbers, as a rule is given them."""
    rule, stored = options["rule"], torch.empty(shape, device="meta")
    weight = stored.mT if position < 2 and turned(position, stored, rule) else stored
    rows = weight.shape[-2] if position < 2 else 1
    kept = "fp32" if position == 2 else options["state_dtype"]
    names = RULES[rule].state_of(position)
    state = {name: initial_state(name, weight, rows, 0, kept).to("meta")[None] for name in names}
    return Stack(weight[None], state, shape[-2:], weight[None])


def _batch(shape: Any) -> int:
    return int(torch.Size(shape[:-2]).numel())


def _cholesky(shape: Any, *_: Any, **__: Any) -> float:
    return _batch(shape) * shape[-1] ** 3 / 3


def _solve(matrix: Any, right: Any, *_: Any, **__: Any) -> float:
    return float(torch.Size(right).numel() * matrix[-1])


def _qr(shape: Any, mode: str = "reduced", *_: Any, **__: Any) -> float:
    m, n = max(shape[-2:]), min(shape[-2:])
    return _batch(shape) * (4 * m * n**2 - 4 * n**3 / 3) / (2 if mode == "r" else 1)


def _eigh(shape: Any, UPLO: str = "L", compute_v: bool = True, *_: Any, **__: Any) -> float:
    return _batch(shape) * (9.0 if compute_v else 4 / 3) * shape[-1] ** 3


def _svd(shape: Any, *_: Any, **__: Any) -> float:
    m, n = max(shape[-2:]), min(shape[-2:])
    return _batch(shape) * (4.0 * m * m * n + 8 * m * n * n + 9 * n**3)


aten = torch.ops.aten
SOLVERS: dict[Any, Any] = {
    aten.linalg_cholesky_ex: _cholesky,
    aten.linalg_solve_triangular: _solve,
    aten.linalg_qr: _qr,
    aten._linalg_eigh: _eigh,
    aten._linalg_svd: _svd,
}
