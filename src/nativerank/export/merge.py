"""Which factors are merged into their matrix: W = A B^T (or U diag(s) V^T), summed in float64.

none    every matrix stays as it is
auto    those whose factors save nothing, r >= r* = d_in d_out / (d_in + d_out), become dense
all     every matrix becomes dense: the stock architecture
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from nativerank.layers import to_dense_modules
from nativerank.layers.base import factor_layers
from nativerank.layers.rank import break_even_rank


@dataclass(frozen=True)
class Merged:
    """What becomes of one factored matrix (of a stack of experts, of each)."""

    name: str
    d_out: int
    d_in: int
    rank: int
    break_even: float
    merged: bool


def past_break_even(layer: Any) -> bool:
    """Whether a layer's factors are no smaller than the matrix they stand for."""
    return bool(layer.rank >= break_even_rank(layer.in_features, layer.out_features))


CHOICES = {"none": lambda layer: False, "auto": past_break_even, "all": lambda layer: True}


def merge_factors(model: nn.Module, how: str) -> list[Merged]:
    """Merges a model in place; what became of every matrix that was factored."""
    chosen = CHOICES[how]
    found = []
    for name, layer in factor_layers(model).items():
        d_in, d_out = layer.in_features, layer.out_features
        found.append(Merged(name, d_out, d_in, layer.rank, break_even_rank(d_in, d_out), bool(chosen(layer))))
    to_dense_modules(model, chosen)
    return found
