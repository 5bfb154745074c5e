"""A card as its folder holds it: which claims, and what is run for them at which scale.

    reproductions/scales.yaml        what the cards share: common settings, horizons, seeds
                 /NAME/config.yaml   the claims of a card, and its experiments
                      /result.json   what they gave, by scale (`reproduce.store`)
                      /figure.svg    card.md   made of it (`reproduce.render`)
                      /paper/*.yaml  runs at the publication's own size, for `nativerank train --config`

An experiment is a race (arms with searched rates, all seeds, at every horizon), a measure (a command of ours that
answers in JSON) or a sweep (as of `nativerank scaling`). Equal arms of several cards are the same cells of one grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from nativerank.config import hint_of, nearest
from nativerank.schema import from_dict

CONFIG, SCALES, PAPER = "config.yaml", "scales.yaml", "paper"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a publication says.

    Args:
        says: in a sentence. source: where. published: its numbers, where there are any.
    """

    says: str
    source: str
    published: str = ""


@dataclass(frozen=True, kw_only=True)
class Race:
    """Arms on identical data, each at its own searched rates.

    Args:
        arms: as `nativerank compare --methods` takes them, one by one.
        settings: over those of the scale, by dotted key.
        budget: "tokens" gives every arm the same steps, "flops" the training FLOPs of the first.
        horizons: steps; null takes the scale's.
        stages: coordinates of the line search; null takes the scale's.
        multiples: of an arm's searched matrix rate, run with all seeds too, and what the probe sees there.
        capped: arm -> arm: the first once more at its largest multiple, its steps of W capped at the other's rate.
        converted: every arm starts from this arm's trained model at the last horizon, turned into factors of the
            arm's rank, instead of from scratch.
    """

    arms: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    budget: Literal["tokens", "flops"] = "tokens"
    horizons: list[int] | None = None
    stages: str | None = None
    multiples: list[float] = field(default_factory=list)
    capped: dict[str, str] = field(default_factory=dict)
    converted: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Models of several sizes at equal training FLOPs ("exact"), every seed.

    Args:
        sizes: presets. budgets: FLOPs. arms: as in a race.
        tokens_per_param: runs outside of this range are left out.
    """

    sizes: list[str]
    budgets: list[float]
    arms: list[str]
    tokens_per_param: tuple[float, float] = (0.0, 1e9)


@dataclass(frozen=True, kw_only=True)
class Experiments:
    """What a card runs at one scale.

    Args:
        races: by name. measures: name -> command without `nativerank` and `--json`. sweeps: by name.
        note: what a reader should know of this scale.
    """

    races: dict[str, Race] = field(default_factory=dict)
    measures: dict[str, str] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The publication's own runs, planned and not made.

    Args:
        device: DEVICE or DEVICExN of the plan. note: what of the publication is not known.
    """

    device: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card.

    Args:
        title: of the card. claims: by the name that its judge knows.
        scales: name -> experiments. paper: how the publication's own runs are planned.
        limits: what the results cannot say.
    """

    title: str
    claims: dict[str, Claim]
    scales: dict[str, Experiments]
    paper: Paper | None = None
    limits: str = ""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What all cards share at one scale.

    Args:
        what: in a sentence.
        settings: of every run. horizons: in steps. seeds: 0 .. seeds - 1.
        stages: coordinates of the line search of every arm at every horizon.
        needs: "cuda" where it is no use without.
    """

    what: str
    settings: dict[str, Any]
    horizons: list[int]
    seeds: int = 3
    stages: str = "lr,aux_lr,init_scale"
    needs: Literal["cuda"] | None = None


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The file of the scales, by name."""

    scales: dict[str, Scale]


def read_card(folder: Path) -> Card:
    """The card of a folder.

    Raises:
        ValueError: no config.yaml, or one with an unknown key or a value of another type.
    """
    card = _read(folder / CONFIG, Card)
    for experiments in card.scales.values():
        for race in experiments.races.values():
            check_settings(race.settings, folder / CONFIG)
    return card


def read_scales(root: Path) -> dict[str, Scale]:
    """The scales by name; raises a ValueError as `read_card`."""

    scales = _read(root / SCALES, Scales).scales
    for scale in scales.values():
        check_settings(scale.settings, root / SCALES)
    return scales


def check_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Raises a ValueError for a key that no run has."""
    for key in settings:
        if hint_of(key) is None:
            raise ValueError(f"{file}: unknown config key {key}")


def _read(file: Path, cls: type[T]) -> T:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(values, Mapping):
            raise ValueError("no group of keys")
        return from_dict(cls, values)
    except FileNotFoundError:
        raise ValueError(f"there is no {file}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from None


def card_names(root: Path) -> list[str]:
    """The folders that hold a card, in order.

    Raises:
        ValueError: there is none.
    """
    names = sorted(file.parent.name for file in root.glob(f"*/{CONFIG}"))
    if not names:
        raise ValueError(f"{root} holds no card; give the folder reproductions of the repository by --cards")
    return names


def chosen(root: Path, wanted: list[str]) -> list[str]:
    """The cards that were asked for, all where none was named.

    Raises:
        ValueError: an unknown one, with the nearest.
    """
    known = card_names(root)
    for name in wanted:
        if name not in known:
            raise ValueError(f"unknown card {name!r}{nearest(name, known)} (cards: {', '.join(known)})")
    return wanted or known
