"""The judges: one module per card, named as its folder.

judge   what a card's claims come to at one scale: name of the claim -> verdict
tell    (if there is one) what else the card says of a scale, in Markdown
draw    (if there is one) the figure, in place of the losses of all arms
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nativerank.reproduce.figure import draw_losses
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import Verdict


@dataclass(frozen=True)
class Judge:
    """What a module of this folder offers."""

    judge: Callable[[Seen], dict[str, Verdict]]
    tell: Callable[[Seen], list[str]]
    draw: Callable[[Seen, Path], Path]


def judge_of(card: str) -> Judge:
    """The judge of a card.

    Raises:
        ValueError: a folder whose name no judge has.
    """
    name = f"{__name__}.{card.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"no judge for the card {card}: there is no module {name}")
    module = importlib.import_module(name)
    return Judge(module.judge, getattr(module, "tell", lambda seen: []), getattr(module, "draw", draw_losses))
