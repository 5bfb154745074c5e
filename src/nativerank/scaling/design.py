"""What a sweep is to train: sizes x budgets x arms x rates x seeds, as one record that a sweep folder keeps.

    --sizes pocket@64x2,pocket@96x3        presets, presets at another size (`models.find_preset`), or config.json files
    --family pocket --widths 64,96         pocket at these widths, as deep as its own aspect d_model / layers says
    --grid miniature                       a named design (`scaling.grids`), which flags change

Budgets are training FLOPs by one of two conventions:

    6nd     C = 6 N D, N by `count`: all parameters ("total") or those that are neither embedding nor head
    exact   C = D times what a token costs, rank-aware, attention and head included (`accounting.flops`)
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from nativerank.experiments.arms import Arm, Value
from nativerank.models import find_preset
from nativerank.scaling.records import Convention, Count

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Design:
    """A sweep.

    Attributes:
        sizes: names of presets, or paths of config.json files.
        budgets: training FLOPs of a run.
        arms: methods, each with settings of its own; rank ratios are among them.
        convention, count: how FLOPs and N are counted for the budgets.
        lrs: matrix rates that every cell runs with; multiples are those of the rule.
        lr_exponent: the rule: the preset's rate times (width / the preset's own width)^lr_exponent.
        seeds: 0 .. seeds - 1, replicates.
        tokens_per_param: cells with fewer or more tokens per parameter (N by `count`) are left out.
        common: settings of every cell, by dotted key.
        params_unit: N enters 6 N D as a multiple of this many parameters, as rounded counts of a publication do.
    """

    sizes: tuple[str, ...]
    budgets: tuple[float, ...]
    arms: tuple[Arm, ...]
    convention: Convention = "6nd"
    count: Count = "total"
    lrs: tuple[Value, ...] = (Value(1.0, relative=True),)
    lr_exponent: float = 0.0
    seeds: int = 1
    tokens_per_param: tuple[float, float] = (0.0, math.inf)
    common: Mapping[str, Any] = field(default_factory=dict)
    params_unit: float | None = None

    def __post_init__(self) -> None:
        for name in ("sizes", "budgets", "arms", "lrs"):
            values = getattr(self, name)
            if not values:
                raise ValueError(
                    f"a sweep needs {name}: give --{'methods' if name == 'arms' else name}, or --grid NAME"
                )
            if len(set(map(str, values))) < len(values):
                raise ValueError(f"a sweep names one of its {name} twice: {', '.join(map(label, values))}")
        if self.convention not in get_args(Convention) or self.count not in get_args(Count):
            known = " and ".join(("/".join(get_args(Convention)), "/".join(get_args(Count))))
            raise ValueError(f"convention and count are {known}, got {self.convention} and {self.count}")
        low, high = self.tokens_per_param
        if not 0 <= low < high:
            raise ValueError(f"--tokens_per_param takes LOW,HIGH with LOW below HIGH, got {low:g},{high:g}")

    def as_dict(self) -> dict[str, Any]:
        """For sweep.json."""
        plain = asdict(self)
        plain["tokens_per_param"] = [self.tokens_per_param[0], finite(self.tokens_per_param[1])]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Design":
        """What `as_dict` made, also after JSON."""
        low, high = plain["tokens_per_param"]
        return cls(
            **{
                **plain,
                "sizes": tuple(plain["sizes"]),
                "budgets": tuple(plain["budgets"]),
                "arms": tuple(Arm(**arm) for arm in plain["arms"]),
                "lrs": tuple(Value(*value) for value in plain["lrs"]),
                "tokens_per_param": (low, math.inf if high is None else high),
            }
        )


def read_sweep(folder: Path) -> dict[str, Any] | None:
    """What sweep.json holds: `design` as of `Design.as_dict`, and the names of `cells`; None if there is none.

    Raises:
        ValueError: it cannot be read.
    """
    file = folder / SWEEP
    if not file.exists():
        return None
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        Design.from_dict(plain["design"])
        return {"design": plain["design"], "cells": list(plain["cells"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {file}: {' '.join(str(error).split())}") from None


def finite(number: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return number if math.isfinite(number) else None


def label(value: Any) -> str:
    """A size, budget, rate or arm in a message."""
    return str(getattr(value, "label", f"{value:g}" if isinstance(value, float) else value))


def family_sizes(name: str, widths: Sequence[int], aspect: float | None = None) -> tuple[str, ...]:
    """The sizes of a family of models that differ in width, with depth in proportion.

    Args:
        name: of the preset. widths: d_model of each. aspect: d_model / layers; None is the preset's own.

    Raises:
        ValueError: an unknown preset, or a width that it cannot have.
    """
    preset = find_preset(name)
    aspect = preset.d_model / preset.layers if aspect is None else aspect
    if not aspect > 0:
        raise ValueError(f"--aspect is d_model per layer, above 0, got {aspect:g}")
    sizes = tuple(f"{name}@{width}x{max(1, round(width / aspect))}" for width in widths)
    for size in sizes:
        find_preset(size)
    return sizes
