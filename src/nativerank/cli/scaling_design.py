"""The flags that say what a sweep trains, for `scaling plan` and `scaling run`."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nativerank.cli.compare import common_settings, whole
from nativerank.cli.train import build_parser, parse

# A sweep reads the loss at the end of its runs alone.
DEFAULTS: dict[str, Any] = {"train.eval_every": 0, "train.probe_every": 0}
GIVEN_ELSEWHERE = {
    "method": "--methods",
    "model.preset": "--sizes",
    "model.config": "--sizes",
    "rank.ratio": "--ratios",
    "optim.lr": "--lrs",
    "train.steps": "--budgets",
    "train.tokens": "--budgets",
    "train.seed": "--seeds",
    "resume": "nothing: runs of a sweep always go on",
}
TEXTS = {
    "grid": ("NAME", "a named sweep, which the other flags change: miniature, desk, spectron (the paper's)"),
    "sizes": ("LIST", "presets, also at another size (pocket@96x3 is 96 wide, 3 deep), or config.json files"),
    "family": ("PRESET", "instead of --sizes: this preset at every width of --widths"),
    "widths": ("LIST", "d_model of each size of the family"),
    "aspect": ("A", "d_model / layers of the family (without: the preset's)"),
    "budgets": ("LIST", "training FLOPs of a run, such as 1e18,3e18"),
    "methods": ("A,B,...", "METHOD or METHOD[KEY=VALUE;...], as in compare"),
    "ratios": ("LIST", "rank ratios; every low-rank method once with each"),
    "lrs": ("LIST", "matrix rates of every cell, or multiples of its rule's such as 0.5x (without: 1x)"),
    "lr_exponent": ("K", "the rule: the preset's rate times (width / preset's width)^K (without: 0)"),
    "seeds": ("N", "replicates, seeds 0 .. N-1 (without: 1)"),
    "convention": ("6nd|exact", "how FLOPs are counted: 6 N D, or rank-aware with attention and head (without: 6nd)"),
    "count": ("total|non_embedding", "the parameters that N counts (without: total)"),
    "tokens_per_param": ("LOW,HIGH", "cells with fewer or more tokens per N are left out (without: none)"),
}


def design_parser(action: str, description: str, example: str, usage: str, first: Any) -> Any:
    """A parser for the flags of a sweep, those of the action, and those of train with other defaults."""

    def add_flags(parser: Any) -> None:
        first(parser)
        group = parser.add_argument_group("the sweep")
        for name, (metavar, text) in TEXTS.items():
            group.add_argument(f"--{name}", metavar=metavar, help=text)

    parser = build_parser(description, example, f"nativerank scaling {action}", usage, add_flags)
    parser.set_defaults(DEFAULTS)
    return parser


def read_design(argv: list[str], parser: Any) -> tuple[Any, Any, Path | None]:
    """(design, or None where no flag says anything of it; the flags; --out).

    Raises:
        ValueError: anything wrong with the flags.
    """
    config, flags = parse(argv, parser)
    common = common_settings(config, GIVEN_ELSEWHERE, "sweep")
    given = {name: text for name in TEXTS if (text := getattr(flags, name)) is not None}
    out = None if config.out is None else Path(config.out)
    if not given and common.keys() <= DEFAULTS.keys() and all(common[key] == DEFAULTS[key] for key in common):
        return None, flags, out
    return make_design(given, common), flags, out


def make_design(given: dict[str, str], common: dict[str, Any]) -> Any:
    """The design of these flags."""
    from nativerank.scaling.design import Design
    from nativerank.scaling.grids import find_grid

    values = read_values(given)
    if "grid" in given:
        base = find_grid(given["grid"])
        return replace(base, **values, common={**common, **base.common, **given_settings(common, base.common)})
    known = {field.name for field in fields(Design)}
    empty: dict[str, Any] = {"sizes": (), "budgets": (), "arms": ()}
    return Design(**{**empty, **{k: v for k, v in values.items() if k in known}, "common": common})


def given_settings(common: dict[str, Any], of_grid: Any) -> dict[str, Any]:
    """The train flags that were given, which a grid's own settings do not overrule."""
    return {key: value for key, value in common.items() if key not in DEFAULTS or value != DEFAULTS[key]}


def read_values(given: dict[str, str]) -> dict[str, Any]:
    """The fields of a design that flags set."""
    from nativerank.experiments.arms import parse_arms, parse_values, with_ratios

    values: dict[str, Any] = {}
    if "sizes" in given and "family" in given:
        raise ValueError("give --sizes or --family, not both")
    if "sizes" in given:
        values["sizes"] = tuple(word.strip() for word in given["sizes"].split(",") if word.strip())
    for name in ("widths", "aspect"):
        if name in given and "family" not in given:
            raise ValueError(f"--{name} belongs to --family PRESET")
    if "family" in given:
        values["sizes"] = sizes_of(given)
    if "budgets" in given:
        values["budgets"] = tuple(absolute("budgets", given["budgets"]))
    if "methods" in given:
        values["arms"] = tuple(parse_arms(given["methods"]))
    if "ratios" in given:
        if "methods" not in given:
            raise ValueError("--ratios needs --methods, whose ranks they are")
        values["arms"] = tuple(with_ratios(list(values["arms"]), parse_values("--ratios", given["ratios"])))
    if "lrs" in given:
        values["lrs"] = parse_values("--lrs", given["lrs"])
    if "lr_exponent" in given:
        values["lr_exponent"] = number("lr_exponent", given["lr_exponent"])
    if "seeds" in given:
        values["seeds"] = whole("seeds", given["seeds"], 1)
    if "tokens_per_param" in given:
        low, high = pair("tokens_per_param", given["tokens_per_param"])
        values["tokens_per_param"] = (low, high)
    return values | {name: given[name] for name in ("convention", "count") if name in given}


def sizes_of(given: dict[str, str]) -> tuple[str, ...]:
    """The sizes of --family."""
    from nativerank.scaling.design import family_sizes

    if "widths" not in given:
        raise ValueError("--family needs --widths LIST")
    widths = [whole("widths", word.strip(), 0) for word in given["widths"].split(",")]
    return family_sizes(given["family"], widths, number("aspect", given["aspect"]) if "aspect" in given else None)


def absolute(name: str, text: str) -> list[float]:
    """Numbers that are no multiples."""
    from nativerank.experiments.arms import parse_values

    values = parse_values(f"--{name}", text)
    if any(value.relative for value in values):
        raise ValueError(f"--{name} takes FLOPs, not multiples, got {text}")
    return [value.number for value in values]


def number(name: str, text: Any) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"--{name} must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"--{name} must be a finite number, got {text}")
    return value


def pair(name: str, text: str) -> tuple[float, float]:
    """LOW,HIGH; either may be left empty."""
    low, comma, high = text.partition(",")
    if not comma:
        raise ValueError(f"--{name} takes LOW,HIGH, got {text!r}")
    return number(name, low) if low.strip() else 0.0, number(name, high) if high.strip() else math.inf
