"""What is compared, as it is written: arms, and the values of their coordinates.

    --methods spectron,spectron[optim.nesterov=true],self-guided[guide.init=dense]
    --lrs 0.5x,1x,2x   --aux_lrs 0.01,0.02

An arm is a method, in brackets with settings of its own (any key of RunConfig). A coordinate takes absolute values, or
with the suffix x multiples of what the arm starts from: its settings, the common flags, or the preset's default.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from nativerank.config import RunConfig, from_dict, hint_of, keys, nearest, to_dict
from nativerank.methods import find_method

LR, AUX_LR, INIT_SCALE = COORDINATES = ("optim.lr", "optim.aux_lr", "model.init_scale")
NOT_IN_ARMS = {
    "method": "the method stands before the bracket",
    "out": "the comparison names the cells' folders",
    "resume": "cells always go on where they stopped",
    "train.seed": "--seeds gives the seeds",
}
RANKS = ("rank.ratio", "rank.value", "rank.energy")
OPENING, CLOSING = "[{(", ")}]"


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        label: what it is called in tables; unique.
        method: row of the method table.
        settings: dotted keys of RunConfig that are its own.
        group: arms of one group are ranked together, against the first of it.
    """

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""


class Value(NamedTuple):
    """A value of a coordinate, or a multiple of the arm's default."""

    number: float
    relative: bool = False

    def at(self, default: float) -> float:
        """The value itself; three digits are enough for a rate."""
        if not self.relative:
            return self.number
        return default if self.number == 1 else float(f"{default * self.number:.3g}")


ONCE = (Value(1.0, relative=True),)


def parse_arms(text: str) -> list[Arm]:
    """The arms of a comma list.

    Raises:
        ValueError: an empty list, brackets that do not fit, an unknown method or key, a value of the wrong type, or
            one arm twice.
    """
    arms = [parse_arm(part) for part in split(text, ",", "--methods")]
    if not arms:
        raise ValueError("--methods names no method")
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"--methods names {label} twice")
    return arms


def parse_arm(text: str) -> Arm:
    """METHOD or METHOD[KEY=VALUE;...]."""
    match = re.fullmatch(r"([^\[\]]*)(?:\[(.*)\])?", text, flags=re.S)
    if not match:
        raise ValueError(f"brackets in {text!r} do not fit: METHOD[KEY=VALUE;KEY=VALUE]")
    method, inner = match[1].strip(), match[2]
    find_method(method)
    settings = parse_settings(inner, text) if inner is not None else {}
    return Arm(shown(method, settings), method, settings)


def shown(method: str, settings: Mapping[str, Any]) -> str:
    """An arm as it is written."""
    inside = ";".join(f"{key}={written(value)}" for key, value in settings.items())
    return f"{method}[{inside}]" if inside else method


def written(value: Any) -> str:
    """A value as a person writes it, which reads back as the same: true, null, 3, 1e9."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, float):
        return str(value)
    short = re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), f"{value:g}")
    plain = re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), repr(value).removesuffix(".0"))
    return short if float(short) == value and len(short) < len(plain) else plain


def parse_settings(inner: str, arm: str) -> dict[str, Any]:
    """The settings inside the brackets, typed."""
    settings: dict[str, Any] = {}
    for part in split(inner, ",;", arm):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not key:
            raise ValueError(f"{part!r} in {arm} is no setting; write KEY=VALUE")
        if key in NOT_IN_ARMS:
            raise ValueError(f"{arm} cannot set {key}: {NOT_IN_ARMS[key]}")
        if key in settings:
            raise ValueError(f"{arm} sets {key} twice")
        settings[key] = typed(key, value)
    if not settings:
        raise ValueError(f"the brackets of {arm} are empty")
    return settings


def split(text: str, marks: str, what: str) -> Iterator[str]:
    """The parts of a text between marks that stand outside all brackets, empty ones left out.

    Raises:
        ValueError: a bracket without its partner.
    """
    depth, part = 0, ""
    for letter in text:
        depth += (letter in OPENING) - (letter in CLOSING)
        if depth < 0:
            break
        if depth == 0 and letter in marks:
            yield from [part.strip()] if part.strip() else []
            part = ""
        else:
            part += letter
    if depth:
        raise ValueError(f"brackets do not fit in {what} {text!r}")
    yield from [part.strip()] if part.strip() else []


def typed(key: str, text: str) -> Any:
    """The value of a key from its text, checked as strictly as a configuration file is.

    Raises:
        ValueError: an unknown key, naming the nearest; or a value of the wrong type.
    """
    hint = hint_of(key)
    if hint is None:
        raise ValueError(f"unknown config key {key}{nearest(key, keys(RunConfig))}")
    if dataclasses.is_dataclass(hint):
        raise ValueError(f"config key {key} holds a group of keys, not a value")
    value = _read(text, hint)
    plain: Any = to_dict(configured({key: value}))  # raises where the type is wrong
    for part in key.split("."):
        plain = plain[part]
    return plain


def _read(text: str, hint: Any) -> Any:
    """YAML, but words stay words where words are wanted ("off") and 1e-3 is a number."""
    origin = typing.get_origin(hint)
    kinds = typing.get_args(hint) if origin in (typing.Union, types.UnionType) else (hint,)
    if text == "null":
        return None
    if any(kind is str or typing.get_origin(kind) is typing.Literal for kind in kinds):
        return text
    try:
        value = yaml.safe_load(text)
        return float(value) if float in kinds and isinstance(value, str) else value
    except (ValueError, yaml.YAMLError):
        return text


def configured(settings: Mapping[str, Any]) -> RunConfig:
    """The RunConfig of dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        target = nested
        for group in groups:
            target = target.setdefault(group, {})
        target[name] = value
    return from_dict(RunConfig, nested)


def parse_values(flag: str, text: str) -> tuple[Value, ...]:
    """The values of a comma list such as "0.5x,1x,2x" or "0.01,0.02".

    Raises:
        ValueError: an empty list, something that is no positive number, or a value twice.
    """
    values = []
    for word in split(text, ",", flag):
        try:
            number = float(word.removesuffix("x"))
        except ValueError:
            raise ValueError(f"{flag} takes numbers, or multiples such as 0.5x, got {word!r}") from None
        if not 0 < number < float("inf"):
            raise ValueError(f"{flag} takes positive numbers, got {word!r}")
        values.append(Value(number, word.endswith("x")))
    if not values:
        raise ValueError(f"{flag} is empty")
    if len(set(values)) < len(values):
        raise ValueError(f"{flag} {text} names a value twice")
    return tuple(values)


def with_ratios(arms: list[Arm], ratios: tuple[Value, ...]) -> list[Arm]:
    """Each low-rank arm once per rank ratio; dense arms as they are.

    Raises:
        ValueError: a ratio that is a multiple or above 1, or an arm that sets its rank itself.
    """
    for ratio in ratios:
        if ratio.relative or ratio.number > 1:
            raise ValueError(f"--ratios takes shares of the width, got {ratio.number:g}{'x' if ratio.relative else ''}")
    spread = []
    for arm in arms:
        own = [key for key in RANKS if key in arm.settings]
        if own:
            raise ValueError(f"{arm.label} sets {own[0]} itself, so --ratios has no meaning for it")
        if find_method(arm.method).layer is None:
            spread.append(arm)
            continue
        for ratio in ratios:
            settings = {**arm.settings, "rank.ratio": ratio.number}
            spread.append(Arm(shown(arm.method, settings), arm.method, settings, arm.group))
    return spread
