"""When ranks are looked at, and whether a configuration of that makes sense."""

import math
from dataclasses import fields, replace

from nativerank.config import AdaptConfig
from nativerank.linalg.energy import check_threshold

DEFAULT_THRESHOLD = 0.97
# Smallest and largest value.
BOUNDS: dict[str, tuple[float, float]] = {
    **{name: (0, 1) for name in ("start", "every", "until", "hysteresis", "grow")},
    **{name: (1, math.inf) for name in ("min", "multiple", "max")},
}
SCHEDULE_ONLY = ("every", "until", "hysteresis")  # what a single look does not read


def resolve_adapt(adapt: AdaptConfig, compiled: bool = False) -> AdaptConfig:
    """The same with mode and threshold filled in, unless ranks stay.

    Args:
        adapt: as it was given.
        compiled: whether the model's blocks are.

    Raises:
        ValueError: a value out of range, or one that has no meaning beside the others.
    """
    mode = adapt.mode or ("off" if adapt.threshold is None else "schedule")
    if mode == "off":
        given = [f.name for f in fields(AdaptConfig) if getattr(adapt, f.name) != f.default and f.name != "mode"]
        if given:
            value = getattr(adapt, given[0])
            raise ValueError(f"rank.adapt.{given[0]} {value} has no meaning while rank.adapt.mode is off")
        return adapt
    adapt = replace(adapt, mode=mode, threshold=DEFAULT_THRESHOLD if adapt.threshold is None else adapt.threshold)
    assert adapt.threshold is not None
    check_threshold(adapt.threshold, "rank.adapt.threshold")
    for name, (low, high) in BOUNDS.items():
        value = getattr(adapt, name)
        if value is not None and not low <= value <= high:
            wanted = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            raise ValueError(f"rank.adapt.{name} must be {wanted}, got {value}")
    if adapt.max is not None and adapt.min > adapt.max:
        raise ValueError(f"rank.adapt.min {adapt.min} is beyond rank.adapt.max {adapt.max}")
    if mode == "once" and (idle := [key for key in SCHEDULE_ONLY if getattr(adapt, key) != getattr(AdaptConfig, key)]):
        raise ValueError(
            f"rank.adapt.{idle[0]} {getattr(adapt, idle[0])} has no meaning while rank.adapt.mode is once, "
            "a single look at rank.adapt.start"
        )
    if mode == "schedule" and adapt.until < adapt.start:
        raise ValueError(f"rank.adapt.until {adapt.until} lies before rank.adapt.start {adapt.start}: no look at all")
    if compiled:
        raise ValueError("ranks that change would have every block compiled again; drop --compile or rank.adapt")
    return adapt


def due(adapt: AdaptConfig, step: int, steps: int, multiple: int = 1) -> bool:
    """Whether the ranks are looked at after `step` of `steps` updates.

    Args:
        adapt: resolved.
        multiple: looks come after a multiple of so many steps, the next one.
    """
    first, interval = (max(1, -(-round(share * steps) // multiple)) * multiple for share in (adapt.start, adapt.every))
    if adapt.mode != "schedule":
        return adapt.mode == "once" and step == first
    return first <= step <= adapt.until * steps and (step - first) % interval == 0
