"""Strict reading and writing of nested configuration dataclasses, by their annotations.

    from_dict   nested mappings -> dataclass; an unknown key or a value of another type is an error that names the key
    to_dict     the way back, plain enough for YAML and JSON
    keys        every dotted key; differences: those in which two configurations differ

Knows no particular class, and no torch.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def nearest(word: str, known: Iterable[str], alike: float = 0.5) -> str:
    """The hint of an error message: '; did you mean X?' for the closest known word, or nothing when none is alike."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=alike)
    return f"; did you mean {close[0]}?" if close else ""


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a configuration of this class accepts."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield prefix + f.name
        if dataclasses.is_dataclass(hints[f.name]):
            yield from keys(hints[f.name], f"{prefix}{f.name}.")


def from_dict(cls: type[T], values: Mapping[str, Any], prefix: str = "", root: type | None = None) -> T:
    """Builds a configuration from nested mappings, strictly.

    Raises:
        ValueError: an unknown key, with the nearest known one; or a value of the wrong type.
    """
    root = root or cls
    hints = typing.get_type_hints(cls)
    unknown = [k for k in values if k not in hints]
    if unknown:
        key = prefix + str(unknown[0])
        raise ValueError(f"unknown config key {key}{nearest(key, keys(root))}")
    given: dict[str, Any] = {}
    for name, value in values.items():
        given[name] = _checked(value, hints[name], prefix + name, root)
    missing = [f.name for f in dataclasses.fields(typing.cast(Any, cls)) if f.name not in given and _is_required(f)]
    if missing:
        raise ValueError(f"config key {prefix}{missing[0]} is missing")
    return cls(**given)


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _checked(value: Any, hint: Any, key: str, root: type) -> Any:
    """The value if it fits the annotation (ints pass as floats, lists as tuples), else a ValueError naming the key."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"config key {key} holds a group of keys, got {value!r}")
        return from_dict(typing.cast(type, hint), value, f"{key}.", root)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _checked(value, next(a for a in args if a is not type(None)), key, root)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"config key {key} must be {described(hint)}, got {value!r}")
        return value
    expected = origin or hint
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is tuple and isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, expected) or (expected is not bool and isinstance(value, bool)):
        raise ValueError(f"config key {key} must be {described(hint)}, got {value!r}")
    if expected is float and not math.isfinite(value):
        raise ValueError(f"config key {key} must be a finite number, got {value!r}")
    if expected is tuple:
        if len(value) != len(args):
            raise ValueError(f"config key {key} takes {len(args)} values, got {list(value)!r}")
        return tuple(_checked(v, a, key, root) for v, a in zip(value, args, strict=True))
    if expected is list:
        return [_checked(v, args[0], key, root) for v in value]
    if expected is dict:
        return {_checked(k, args[0], key, root): _checked(v, args[1], f"{key}.{k}", root) for k, v in value.items()}
    return value


def described(hint: Any) -> str:
    """An annotation in words: "a number", "one of cosine, wsd, constant", "a whole number or null"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else described(a) for a in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is list:
        return 'a list such as \'["a", "b"]\''
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return words.get(hint, f"a {getattr(origin or hint, '__name__', hint)}")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries and lists, ready for YAML or JSON."""
    plain: dict[str, Any] = to_plain(dataclasses.asdict(config))
    return plain


def to_plain(value: Any) -> Any:
    """The same with lists for tuples."""
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> plain value of every key that is no group."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        nested = dataclasses.is_dataclass(value)
        found |= flat(value, f"{prefix}{f.name}.") if nested else {prefix + f.name: to_plain(value)}
    return found


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two configurations of one class differ."""
    found = []
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if dataclasses.is_dataclass(x):
            found += differences(x, y, f"{prefix}{f.name}.")
        elif x != y:
            found.append(prefix + f.name)
    return found
