"""The one optimizer: every parameter in exactly one group, every group with one update rule.

A group's `rule` names an entry of `rules.RULES`. Matrices of equal shape are updated as one stack: their state is
stored side by side for good and each parameter's state is a view of it, so that state_dict() looks like any other
optimizer's; gradients, and the weights where a rule needs them, are copied side by side at a step, in stacks of at
most STACK_BYTES, beyond which stacking stops paying; on a CPU that is earlier, and stacks of large matrices are
updated at once there, one per core. Gradients are never written, state exists from construction on, and no value is
read back to the host.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nativerank.config import OptimConfig
from nativerank.linalg.gram import full_precision
from nativerank.linalg.orthogonalize import coefficients
from nativerank.optim.parallel import at_once, run_all
from nativerank.optim.rules import (
    NONE,
    RULES,
    Change,
    Options,
    Product,
    Rule,
    Stack,
    State,
    formed,
    initial_state,
    shape_scale,
    step_device,
)

# Shared with the configuration, which is their one home; what a method decides is set here for direct use.
RULE_OPTIONS = (
    *("weight_decay", "betas", "eps", "momentum", "norm", "power_iterations", "certified"),
    *("orthogonalizer", "orthogonalizer_steps", "step", "renormalize", "update_cap"),
)
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(OptimConfig) if f.name in RULE_OPTIONS}
DEFAULTS |= {"lr": 1e-3, "nesterov": False, "shape_scale": "none"}
STACK_BYTES, STACK_BYTES_CPU = 1 << 25, 1 << 21  # of one side of a stack


@dataclass
class Bucket:
    """Equal-shaped parameters of a group (or equal-shaped pairs: `sides` is then up, down) and their stacked state."""

    sides: list[list[Tensor]]
    states: list[State]
    record: State = field(default_factory=dict)


class LowRankOptimizer(torch.optim.Optimizer):
    """Drives AdamW, Muon and Spectron groups together.

    Args:
        groups: dicts with `params` (named parameters; for a pair rule up, down, up, down ...), `rule`, and any
            option of DEFAULTS.

    Raises:
        ValueError: an unknown rule or option, a value out of range, or a parameter in two groups.
    """

    guides: Any = None  # layers.Guides of self-guided training, which fade as the optimizer steps

    def __init__(self, groups: Iterable[dict[str, Any]]):
        groups = list(groups)
        for group in groups:
            _check(group)
        super().__init__(groups, dict(DEFAULTS))
        self._buckets: dict[int, list[Bucket]] = {}
        for index, group in enumerate(self.param_groups):
            group["initial_lr"] = group["lr"]
            for i, p in enumerate(group["params"]):
                down = RULES[group["rule"]].kind == "pair" and i % 2 == 1
                tall = p.shape[-1] if down or p.dim() < 2 else p.shape[-2]
                self.state[p] = {
                    name: initial_state(name, p, tall, seed=index * 1_000_003 + i)
                    for name in RULES[group["rule"]].state
                }

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every parameter that has a gradient; a pair moves only if both factors have one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            rule = RULES[group["rule"]]
            if rule.kind == "elementwise":
                self._step_adamw(group)
            else:
                pieces = [partial(_step_bucket, bucket, rule, group) for bucket in self._group_buckets(index)]
                run_all(pieces, at_once(group["params"]))
        if self.guides is not None:
            self.guides.set(self.guides.step + 1)
        return loss

    def set_rate(self, multiplier: float) -> None:
        """Sets every group's lr to this share of the peak it was built with."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * multiplier

    def records(self) -> dict[str, dict[str, float]]:
        """What the last step recorded per pair (sigma_A, sigma_B, rho; or cap_factor), by the factorized module's name.

        Reads from the device: for logging, not for the hot path. Stacked experts report their largest value.
        """
        found: dict[str, dict[str, float]] = {}
        for index, group in enumerate(self.param_groups):
            names = dict(zip(map(id, group["params"]), group.get("param_names", []), strict=False))
            for bucket in self._buckets.get(index, []):
                values = {
                    k: v.flatten(1).amax(-1).tolist() if v.dim() > 1 else v.tolist() for k, v in bucket.record.items()
                }
                for i, p in enumerate(bucket.sides[0]):
                    if values and id(p) in names:
                        module = names[id(p)].removesuffix(".weight").removesuffix(".up")
                        found[module] = {k: v[i] for k, v in values.items()}
        return found

    def release(self, group: str) -> None:
        """Lets go of the parameters of a named group, of their gradients and their state."""
        for found in (g for g in self.param_groups if g.get("name") == group):
            for p in found["params"]:
                del self.state[p]
                p.grad = None
            found["params"], found["param_names"] = [], []

    def adopt(self, group: str, parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
        """Takes parameters into a named group that was released, with the state they have at step 0."""
        for found in (g for g in self.param_groups if g.get("name") == group):
            found["params"] = [p for _, p in parameters]
            found["param_names"] = [name for name, _ in parameters]
            for p in found["params"]:
                self.state[p] = {k: initial_state(k, p, p.shape[-1], seed=0) for k in RULES[found["rule"]].state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(step_device(p))
        self._buckets = {}  # the loaded tensors are not views of our stacks any more: stack them again when needed

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = {}

    def _step_adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _group_buckets(self, index: int) -> list[Bucket]:
        if index not in self._buckets:
            group = self.param_groups[index]
            width = 2 if RULES[group["rule"]].kind == "pair" else 1
            members: dict[Any, list[tuple[Tensor, ...]]] = {}
            for start in range(0, len(group["params"]), width):
                unit = tuple(group["params"][start : start + width])
                members.setdefault(tuple((p.shape, p.dtype, p.device) for p in unit), []).append(unit)
            self._buckets[index] = [
                self._bucket([list(side) for side in zip(*units[i : i + size], strict=True)])
                for units in members.values()
                for size in [_members_per_stack(units[0])]
                for i in range(0, len(units), size)
            ]
        return self._buckets[index]

    def _bucket(self, sides: list[list[Tensor]]) -> Bucket:
        """Moves the members' state into stacks and makes each member's state a view of its row."""
        states: list[State] = []
        for side in sides:
            stacked = {key: torch.stack([self.state[p][key] for p in side]) for key in self.state[side[0]]}
            for i, p in enumerate(side):
                self.state[p].update({key: value[i] for key, value in stacked.items()})
            states.append(stacked)
        return Bucket(sides, states)


def _members_per_stack(unit: tuple[Tensor, ...]) -> int:
    limit = STACK_BYTES_CPU if unit[0].device.type == "cpu" else STACK_BYTES
    return max(1, limit // max(p.numel() * p.element_size() for p in unit))


def _check(group: dict[str, Any]) -> None:
    if group.get("rule") not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {group.get('rule')!r}")
    unknown = set(group) - set(DEFAULTS) - {"params", "rule", "name"}
    if unknown:
        raise ValueError(f"unknown optimizer option {sorted(unknown)[0]!r}; known are {', '.join(DEFAULTS)}")
    options = {**DEFAULTS, **group}
    if options["lr"] < 0 or options["weight_decay"] < 0 or options["eps"] <= 0:
        got = ", ".join(f"{k} {options[k]}" for k in ("lr", "weight_decay", "eps"))
        raise ValueError(f"lr and weight_decay must be >= 0 and eps > 0, got {got}")
    if not all(0 <= x < 1 for x in (*options["betas"], options["momentum"])):
        raise ValueError(f"betas and momentum must lie in [0, 1), got {options['betas']}, {options['momentum']}")
    if options["power_iterations"] < 1:
        raise ValueError(f"power_iterations must be at least 1, got {options['power_iterations']}")
    if options["rule"] != "adamw":  # unknown names and counts below 1 are errors now, not at the first step
        if options["orthogonalizer"] != NONE:
            coefficients(options["orthogonalizer"], options["orthogonalizer_steps"])
        shape_scale(options["shape_scale"], 1, 1)
    if options["step"] not in ("paper", "root"):
        raise ValueError(f"step must be paper or root, got {options['step']!r}")
    if options["norm"] not in ("power", "exact"):
        raise ValueError(f"norm must be power or exact, got {options['norm']!r}")
    if options["certified"] and options["rule"] != "spectron":
        raise ValueError(f"certified belongs to the rule spectron, got {options['rule']}")
    if options["certified"] and not options["renormalize"]:
        raise ValueError("certified chooses rho from measured norms; renormalize: false leaves it no say")
    cap = options["update_cap"]
    if (cap is not None) != (options["rule"] == "adamw-capped") or (cap is not None and cap <= 0):
        raise ValueError(f"update_cap is a positive number for the rule adamw-capped, got {cap} for {options['rule']}")
    bounded = options["rule"] == "spectron" and options["renormalize"] and options["orthogonalizer"] != NONE
    if bounded and options["step"] == "paper" and options["lr"] > 1 and not options["certified"]:
        raise ValueError(
            "spectron's lr is a bound on ||dW|| and must be at most 1 (its proof needs rho <= 1), "
            f"got {options['lr']}; with step root or certified it may be larger"
        )


@torch.no_grad()
def _step_bucket(bucket: Bucket, rule: Rule, options: Options) -> None:
    """One stacked update. Members without gradients are left out, their state untouched."""
    active = [
        i for i, members in enumerate(zip(*bucket.sides, strict=True)) if all(p.grad is not None for p in members)
    ]
    if not active:
        return
    everyone = len(active) == len(bucket.sides[0])
    sides = bucket.sides if everyone else [[side[i] for i in active] for side in bucket.sides]
    rows = None if everyone else torch.tensor(active, device=sides[0][0].device)
    states = bucket.states if rows is None else [{k: v[rows.to(v.device)] for k, v in s.items()} for s in bucket.states]
    pair = rule.kind == "pair"
    stacks = [_stack(side, state, i == 1, pair) for i, (side, state) in enumerate(zip(sides, states, strict=True))]
    assert rule.update is not None
    with full_precision(sides[0][0].device):
        result = rule.update(*stacks, options)
    changes = result[:2] if pair else [result]
    if pair:
        bucket.record = result[2] if everyone else {}
    if rows is not None:
        for whole, part in zip(bucket.states, states, strict=True):
            for key in whole:
                whole[key].index_copy_(0, rows.to(whole[key].device), part[key])
    for i, (side, change) in enumerate(zip(sides, changes, strict=True)):
        if options["weight_decay"]:
            torch._foreach_mul_(side, 1 - options["lr"] * options["weight_decay"])
        _subtract(side, change, i == 1)


def _subtract(side: list[Tensor], change: Change, down: bool) -> None:
    """p <- p - D for every member. A product goes into a CPU's matrix in one pass over it, without a D in between."""
    p = side[0]
    if isinstance(change, Product) and p.device.type == "cpu" and p.dim() == 2 and p.dtype == change.M.dtype:
        for member, M, Q in zip(side, *change, strict=True):
            (member.mT if down else member).addmm_(M, Q, alpha=-1)
        return
    D = formed(change)
    torch._foreach_sub_(side, list((D.mT if down else D).to(p.dtype)))


def _stack(side: list[Tensor], state: State, down: bool, with_weight: bool) -> Stack:
    """The parameters as a Stack; a `down` (r, d_in) becomes the tall view B (d_in, r), momentum included."""
    weight = _side_by_side([p.detach() for p in side]) if with_weight else None
    grad = _side_by_side([p.grad for p in side if p.grad is not None])
    rows, cols = side[0].shape[-2:]
    if down:
        weight, grad = None if weight is None else weight.mT, grad.mT
        state = {k: v.mT if v.dim() == grad.dim() else v for k, v in state.items()}
    return Stack(weight, grad, state, (rows, cols))


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    """A stack; of a single tensor a view, so that large matrices are not copied at all."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
