"""The table of update rules on row shards: gram rules by the names of `rules.RULES` (see `optim.ask`)."""

from collections.abc import Callable
from typing import Any

from nativerank.optim.directions import Options
from nativerank.optim.gram_frames import GRAM_FRAMES
from nativerank.optim.gram_products import GRAM_PRODUCTS
from nativerank.optim.rules import RULES

GRAM_RULES: dict[str, Callable[..., Any]] = {**GRAM_PRODUCTS, **GRAM_FRAMES}


def refusal(rule: str, options: Options) -> str | None:
    """Why a rule with these options has no form on row shards; None if it has one."""
    if rule not in GRAM_RULES:
        return f"{rule} goes element by element"
    if "retraction" in RULES[rule].options and options["retraction"] == "cayley":
        return "optim.retraction cayley needs a second pass over the rows, which takes another exchange"
    if rule == "stiefel-spectron" and options["certified"]:
        return "optim.certified with two frames measures each candidate step, exchange by exchange"
    return None
