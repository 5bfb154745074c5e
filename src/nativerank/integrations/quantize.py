"""Weights in int8 for inference, by torchao: a factor pair at a quarter of its bytes.

    A, B of W = A B^T each as int8 codes and a scale per output row of up and down:
    a weight is off by half a step at most, 1/254 of the largest of its row

Activations stay as they are (weight-only): a row of codes is multiplied and then scaled. Dense hidden matrices are
quantized alike, embedding and norms are not, the output head only on request. Both factors of a pair are rounded, so a
pair carries two errors where a dense matrix carries one; what that does to a loss is in docs/quantize.md.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from nativerank.accounting.memory import weights_bytes
from nativerank.extras import require
from nativerank.layers import FactorLayer, matrix_parameters
from nativerank.layers.base import factor_linears

FORMATS = ("int8",)
EXTRA, WHAT = "quantize", "quantization"


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did.

    Attributes:
        matrices: names of the linear modules whose weights are int8 now.
        bytes_before, bytes_after: of all parameters and buffers.
    """

    matrices: list[str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return f"{len(self.matrices)} matrices in int8, {self.bytes_before:,} -> {self.bytes_after:,} bytes"


@torch.no_grad()
def quantize(model: nn.Module, format: str = "int8", *, head: bool = False) -> Quantized:
    """Quantizes the weights of a model in place, for inference: the last thing that is done to it.

    Factors can no longer be looked at, trained, merged or saved; save the model before.

    Args:
        model: factored, dense or mixed.
        format: "int8", weight-only with a scale per row.
        head: the output head too.

    Raises:
        ValueError: an unknown format, no torchao, a head that is not there or is the embedding too, a model that is
            quantized already, or nothing to quantize.
    """
    if format not in FORMATS:
        raise ValueError(f"quantize must be {', '.join(FORMATS)}, got {format!r}")
    api: Any = require("torchao.quantization", EXTRA, WHAT)
    if any(isinstance(p, require("torchao.utils", EXTRA, WHAT).TorchAOBaseTensor) for p in model.parameters()):
        raise ValueError("the model is quantized already")
    names = hidden_linears(model) + ([head_name(model)] if head else [])
    if not names:
        raise ValueError("quantize found no linear layer: the model has neither factors nor hidden matrices")
    before = weights_bytes(model)
    chosen = set(names)
    api.quantize_(model, api.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in chosen)
    for name, module in model.named_modules():
        if isinstance(module, FactorLayer):
            vars(module)["factors"] = Refusal(name)  # before the one of its class
    return Quantized(names, before, weights_bytes(model))


class Refusal:
    """In the place of a layer's `factors`, on which merging, spectra and ranks rely."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self) -> NoReturn:
        raise ValueError(f"{self.name} is quantized and has no factors to look at any more; do that before")


def hidden_linears(model: nn.Module) -> list[str]:
    """Names of the linear modules that are halves of factors or dense hidden matrices."""
    modules = dict(model.named_modules())
    dense = (name.removesuffix(".weight") for name in matrix_parameters(model))
    return [*factor_linears(model), *(name for name in dense if isinstance(modules.get(name), nn.Linear))]


def head_name(model: Any) -> str:
    """The name of the output head.

    Raises:
        ValueError: there is none, or its weight is the embedding's.
    """
    ask = getattr(model, "get_output_embeddings", None)
    found = ask() if callable(ask) else None
    if not isinstance(found, nn.Linear):
        raise ValueError("quantize(head=True): the model has no output head that is a linear layer")
    if found.weight is getattr(model.get_input_embeddings(), "weight", None):
        raise ValueError("quantize(head=True): the output head is the embedding too, which stays as it is")
    return next(name for name, module in model.named_modules() if module is found)
