"""The table of update rules on row shards: gram rules by the names of `rules.RULES` (see `optim.ask`)."""

from collections.abc import Callable
from typing import Any

from nativerank.optim.gram_products import GRAM_PRODUCTS

GRAM_RULES: dict[str, Callable[..., Any]] = {**GRAM_PRODUCTS}


def refusal(rule: str, options: Any) -> str | None:
    """Why a rule with these options has no form on row shards; None if it has one."""
    return None if rule in GRAM_RULES else f"{rule} has no form on row shards"
