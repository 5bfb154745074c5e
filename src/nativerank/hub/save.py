"""A model into a folder: safetensors, a config that can rebuild it, and its tokenizer.

    factored   config.json with model_type "nativerank": the Hugging Face config under "base", kind and rank of every
               factorized module; weights as `...down.weight`, `...up.weight`
    dense      the stock architecture with W = A B^T merged (in float64), readable by plain transformers

Everything is written to a temporary name and renamed, so a folder is complete or not there.
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from nativerank.hub.load import CONFIG, MODEL_TYPE, TOKENIZER, WEIGHTS
from nativerank.hub.weights import named_tensors, write_tensors
from nativerank.layers import to_dense_modules
from nativerank.optim.roles import factor_modules
from nativerank.version import __version__


def save(model: nn.Module, folder: str | Path, format: str = "factored", tokenizer: Any = None) -> Path:
    """Writes a Hugging Face model, factorized or not, into a new folder.

    Args:
        model: left as it is.
        folder: must not exist, or be empty.
        format: "factored" keeps the factors; "dense" merges a copy into the stock architecture.
        tokenizer: a `tokenizers.Tokenizer` to be stored beside the weights.

    Raises:
        ValueError: an unknown format, a folder that holds something, or a disk that is full.
    """
    folder = Path(folder)
    if format not in ("factored", "dense"):
        raise ValueError(f"format must be factored or dense, got {format!r}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty")
    if format == "dense" and factor_modules(model):
        model = copy.deepcopy(model)
        to_dense_modules(model)
    partial = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        (partial / CONFIG).write_text(json.dumps(_config(model), indent=1), encoding="utf-8")
        write_tensors(named_tensors(model), partial / WEIGHTS)
        if tokenizer is not None:
            tokenizer.save(str(partial / TOKENIZER))
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"cannot write the model to {folder}: {error}") from None
    return folder


def _config(model: nn.Module) -> dict[str, Any]:
    hf: Any = model
    base = hf.config.to_dict()
    base["architectures"] = [type(model).__name__]
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
