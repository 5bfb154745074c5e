"""A model into a folder: safetensors, a config that can rebuild it, and its tokenizer.

    factored   config.json with model_type "nativerank": the Hugging Face config under "base", kind and rank of every
               factorized module; weights as `...down.weight`, `...up.weight`
    dense      the stock architecture with W = A B^T merged (in float64), readable by plain transformers

Everything is written to a temporary name and renamed, so a folder is complete or not there.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import full
from nativerank.distributed.wrap import original_class
from nativerank.files import new_folder
from nativerank.hub.load import CONFIG, TOKENIZER, WEIGHTS
from nativerank.hub.weights import named_tensors, write_tensors
from nativerank.layers import guided_layers, to_dense_modules
from nativerank.models import MODEL_TYPE
from nativerank.optim.roles import factor_modules
from nativerank.version import __version__


def save(
    model: nn.Module,
    folder: str | Path,
    format: str = "factored",
    tokenizer: Any = None,
    replace: bool = False,
    companions: Iterable[Path] = (),
    tensors: dict[str, Tensor] | None = None,
    check: Callable[[Path], None] = lambda written: None,
) -> Path:
    """Writes a Hugging Face model, factorized or not, into a new folder.

    Args:
        model: left as it is.
        folder: must not exist, or be empty, unless `replace`.
        format: "factored" keeps the factors; "dense" merges a copy into the stock architecture.
        tokenizer: a `tokenizers.Tokenizer` to be stored beside the weights.
        replace: take the place of what the folder holds, once everything is written.
        companions: files to be copied beside the weights as they are.
        tensors: the factored weights, of a model that itself holds shards (`whole_tensors`).
        check: called with the complete folder while it still has its temporary name; what it raises leaves no folder.

    Raises:
        ValueError: an unknown format, a guide that is still there, a module that is no Hugging Face model, a folder
            that holds something, or a disk that is full.
    """
    if format not in ("factored", "dense"):
        raise ValueError(f"format must be factored or dense, got {format!r}")
    guided = [name for name, layer in guided_layers(model).items() if layer.guide is not None]
    if guided:
        raise ValueError(f"{guided[0]} still has its guide, which a saved model cannot hold; train until it is freed")
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} has no Hugging Face config, so no folder could rebuild it")
    if format == "dense" and factor_modules(model):
        model = copy.deepcopy(model)
        to_dense_modules(model)
    with new_folder(Path(folder), replace) as partial:
        (partial / CONFIG).write_text(json.dumps(_config(model), indent=1), encoding="utf-8")
        write_tensors(named_tensors(model) if tensors is None else tensors, partial / WEIGHTS)
        if tokenizer is not None:
            (partial / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")  # .save hides errors
        for file in companions:
            shutil.copyfile(file, partial / file.name)
        check(partial)
    return Path(folder)


def whole_tensors(model: nn.Module, grid: Grid) -> dict[str, Tensor]:
    """Weights and buffers of a sharded model in the host memory of the first process, one gathered after the other.

    Called by all processes; nothing on the others.
    """
    found = {}
    for name, tensor in named_tensors(model).items():
        whole = full(tensor)
        if grid.rank == 0:
            found[name] = whole.cpu()
    return found


def _config(model: nn.Module) -> dict[str, Any]:
    hf: Any = model
    base = hf.config.to_dict()
    base.pop("_name_or_path", None)  # where the model came from on this machine
    base["architectures"] = [original_class(model).__name__]
    factors = factor_modules(model)
    if not factors:
        return dict(base)
    return {
        "model_type": MODEL_TYPE,
        "nativerank_version": __version__,
        "kind": factors[0][1].kind,
        "ranks": {name: module.rank for name, module in factors},
        "base": base,
    }
