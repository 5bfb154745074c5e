"""The table of update rules on row shards: gram rules by the names of `rules.RULES` (see `optim.ask`)."""

from collections.abc import Callable
from typing import Any

from nativerank.optim.gram_products import GRAM_PRODUCTS

GRAM_RULES: dict[str, Callable[..., Any]] = {**GRAM_PRODUCTS}
