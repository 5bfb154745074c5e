"""The options of a group of parameters: what they are without being given, and which values cannot be.

Everything that is wrong is said before the first step, by the key of the configuration. Choices are read off
OptimConfig, their one home; ranges and contradictions are tables of (what holds, what is said where it does not).
"""

import typing
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from nativerank.config import OptimConfig
from nativerank.linalg.retract import TRIANGULAR
from nativerank.optim.directions import NONE, Options
from nativerank.optim.rules import COMMON, RULES

RULE_OPTIONS = (
    *("weight_decay", "betas", "eps", "momentum", "norm", "power_iterations", "certified"),
    *("orthogonalizer", "orthogonalizer_steps", "step", "renormalize", "update_cap"),
    *("s_lr", "retraction", "preserve", "riemannian", "retract_every", "state_dtype"),
)
# Shared with the configuration; what a method decides is set here for direct use.
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(OptimConfig) if f.name in RULE_OPTIONS}
DEFAULTS |= {"lr": 1e-3, "nesterov": False, "shape_scale": "none", "retraction": "cholesky"}
AUXILIARY = "auxiliary"  # name of the group whose lr is optim.aux_lr

Holds = Callable[[Any], bool]
AT_LEAST_0: tuple[Holds, str] = (lambda x: x >= 0, "at least 0")
AT_LEAST_1: tuple[Holds, str] = (lambda x: x >= 1, "at least 1")
RANGES: dict[str, tuple[Holds, str]] = {
    "lr": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "eps": (lambda x: x > 0, "a positive number"),
    "betas": (lambda x: all(0 <= beta < 1 for beta in x), "in [0, 1)"),
    "momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "power_iterations": AT_LEAST_1,
    "orthogonalizer_steps": AT_LEAST_1,
    "s_lr": (lambda x: x is None or x >= 0, "at least 0"),
    "retract_every": AT_LEAST_1,
    "update_cap": (lambda x: x is None or x > 0, "a positive number"),
}
CONTRADICTIONS: tuple[tuple[Callable[[Options], bool], str], ...] = (
    (
        lambda o: o["rule"] == "adamw-capped" and o["update_cap"] is None,
        "optim.update_cap must be a positive number, got None",
    ),
    (
        lambda o: o["rule"] == "tsvd" and o["retraction"] not in TRIANGULAR,
        f"optim.retraction must be one of {', '.join(TRIANGULAR)} for tsvd, got {{retraction!r}}",
    ),
    (
        lambda o: o["retraction"] == "cayley" and (o["preserve"] or o["rule"] == "frame-spectron"),
        "optim.retraction cayley has no R to be absorbed; with optim.preserve or optim.frames one take another",
    ),
    (
        lambda o: o["retract_every"] > 1 and (o["riemannian"] or o["retraction"] == "cayley"),
        "optim.riemannian and optim.retraction cayley need frames at every step; with them optim.retract_every is 1",
    ),
    (
        lambda o: o["certified"] and o["preserve"],
        "optim.certified measures a plain retraction; drop optim.preserve",
    ),
    (
        lambda o: o["certified"] and not o["renormalize"],
        "optim.certified chooses rho from measured norms; optim.renormalize false leaves it no say",
    ),
    (
        lambda o: o["lr"] > 1 and proof_needs_lr_below_1(o),
        "{rule}'s optim.lr is a bound on ||dW|| and must be at most 1 (its proof needs rho <= 1), got {lr}; "
        "with optim.step root or optim.certified it may be larger",
    ),
)


def proof_needs_lr_below_1(options: Options) -> bool:
    """Whether the step is rho = lr / (sigma_A + sigma_B + 1) along an orthogonalized direction, unmeasured."""
    bounded = options["rule"] in ("spectron", "stiefel-spectron", "frame-spectron") and options["renormalize"]
    return bounded and options["orthogonalizer"] != NONE and options["step"] == "paper" and not options["certified"]


def choices(auxiliary: bool = False) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The options that take one of a few words, with these; embedding, head and the rest may have smaller state."""
    hints = typing.get_type_hints(OptimConfig)
    for name, hint in (hints | ({"state_dtype": hints["aux_state_dtype"]} if auxiliary else {})).items():
        literals = [h for h in (hint, *typing.get_args(hint)) if typing.get_origin(h) is typing.Literal]
        if literals and name in DEFAULTS:
            yield name, typing.get_args(literals[0])


def check_group(group: dict[str, Any]) -> None:
    """Raises a ValueError for an unknown rule or option, one that the rule does not read, or a value that cannot be."""
    if group.get("rule") not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {group.get('rule')!r}")
    unknown = set(group) - set(DEFAULTS) - {"params", "param_names", "rule", "name"}
    if unknown:
        raise ValueError(f"unknown optimizer option {sorted(unknown)[0]!r}; known are {', '.join(DEFAULTS)}")
    options = {**DEFAULTS, **group}
    for name in sorted(set(DEFAULTS) - COMMON - RULES[options["rule"]].options):
        if options[name] != DEFAULTS[name]:
            raise ValueError(f"optim.{name} {options[name]} has no meaning for the update rule {options['rule']}")
    check_values(options)
    for wrong, said in CONTRADICTIONS:
        if wrong(options):
            raise ValueError(said.format(**options))


def check_values(options: Options) -> None:
    """Raises a ValueError naming the first option whose value is none of its choices, or out of its range."""
    auxiliary = options.get("name") == AUXILIARY

    def key(name: str) -> str:
        return f"optim.aux_{name}" if auxiliary and name in ("lr", "state_dtype") else f"optim.{name}"

    for name, known in choices(auxiliary):
        if options[name] not in known:
            raise ValueError(f"{key(name)} must be one of {', '.join(known)}, got {options[name]!r}")
    for name, (holds, wanted) in RANGES.items():
        if not holds(options[name]):
            raise ValueError(f"{key(name)} must be {wanted}, got {options[name]}")
