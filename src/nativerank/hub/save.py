"""A model into a folder: safetensors, a config that can rebuild it, its tokenizer, how it generates, a model card.

    factored   config.json as `nativerank.layers.pretrained` describes it; weights as `...down.weight`, `...up.weight`,
               `...s`; of a LLaMA language model also the code that reads it where nativerank is not installed
    dense      the stock architecture with W = A B^T merged (in float64), readable by plain transformers

Everything is written to a temporary name and renamed, so a folder is complete or not there.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import full
from nativerank.distributed.wrap import original_class
from nativerank.files import new_folder
from nativerank.hub.card import CARD, TRAINING, Training, model_card
from nativerank.hub.companions import write_generation_config, write_tokenizer
from nativerank.hub.load import DTYPES
from nativerank.hub.weights import named_tensors, write_folder
from nativerank.layers import guided_layers, to_dense_modules
from nativerank.layers.base import factor_layers
from nativerank.layers.pretrained import CONFIG, RECORD, check_no_adapters, dtype_name, factored_config

MODELING = Path(__file__).with_name("modeling_nativerank.py")
# By hand: transformers writes no entry for AutoModel of a language model, and serving engines ask for that one.
AUTO_MAP = {
    "AutoConfig": f"{MODELING.stem}.NativerankConfig",
    "AutoModel": f"{MODELING.stem}.NativerankLlamaModel",
    "AutoModelForCausalLM": f"{MODELING.stem}.NativerankLlamaForCausalLM",
}


def save(
    model: nn.Module,
    folder: str | Path,
    format: str = "factored",
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    replace: bool = False,
    companions: Iterable[Path] = (),
    tensors: dict[str, Tensor] | None = None,
    training: Training | None = None,
    check: Callable[[Path], None] = lambda written: None,
) -> Path:
    """Writes a model, factorized or not, into a new folder.

    Args:
        model: of Hugging Face, or any other module, which only `nativerank.load(folder, into=...)` can read then. It
            is left as it is.
        folder: must not exist, or be empty, unless `replace`.
        format: "factored" keeps the factors; "dense" merges a copy into the stock architecture.
        tokenizer: a `tokenizers.Tokenizer` or one of transformers, to be stored beside the weights.
        dtype: in which weights are stored, their own if not given; `s` of spectral layers stays in float32.
        max_shard_size: bytes, or "5GB": more is stored in several files and an index.
        replace: take the place of what the folder holds, once everything is written.
        companions: files to be copied beside the weights as they are.
        tensors: the factored weights, of a model that itself holds shards (`whole_tensors`).
        training: how the model was trained, for the model card.
        check: called with the complete folder while it still has its temporary name; what it raises leaves no folder.

    Raises:
        ValueError: an unknown format or precision, adapters that are not merged, a guide that is still there, a folder
            that holds something, or a disk that is full.
    """
    if format not in ("factored", "dense"):
        raise ValueError(f"format must be factored or dense, got {format!r}")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is one of {', '.join(map(str, DTYPES))}, got {dtype}")
    check_no_adapters(model)
    guided = [name for name, layer in guided_layers(model).items() if layer.guide is not None]
    if guided:
        raise ValueError(f"{guided[0]} still has its guide, which a saved model cannot hold; train until it is freed")
    if format == "dense" and factor_layers(model):
        model = copy.deepcopy(model)
        to_dense_modules(model)
    tensors = named_tensors(model) if tensors is None else tensors
    own_code = brings_code(model)
    config = _config(model, dtype, own_code)
    if training is not None and RECORD in config:
        config[RECORD][TRAINING] = asdict(training)
    with new_folder(Path(folder), replace) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if own_code:
            shutil.copyfile(MODELING, partial / MODELING.name)
        write_folder(tensors, partial, max_shard_size, _stored_dtypes(model, tensors, dtype))
        write_generation_config(model, partial)
        (partial / CARD).write_text(model_card(model, config, training), encoding="utf-8")
        if tokenizer is not None:
            write_tokenizer(tokenizer, model, partial)
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


def brings_code(model: nn.Module) -> bool:
    """Whether the folder of a model holds the code that reads it without nativerank: factored LLaMA causal LMs."""
    llama = original_class(model).__name__ == "LlamaForCausalLM" and hasattr(model, "config")
    return llama and bool(factor_layers(model))


def _config(model: nn.Module, dtype: torch.dtype | None, own_code: bool) -> dict[str, Any]:
    hf: Any = model
    if factor_layers(model) or not hasattr(model, "config"):
        config = factored_config(model)
        if own_code:
            config["auto_map"] = AUTO_MAP
    else:
        config = hf.config.to_dict()
        for key in ("_name_or_path", "auto_map"):  # where the model came from: not true of this folder
            config.pop(key, None)
        config |= {"architectures": [original_class(model).__name__], "dtype": dtype_name(model)}
    return config if dtype is None else config | {"dtype": str(dtype).removeprefix("torch.")}


def _stored_dtypes(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The precision of the weights that do not keep theirs."""
    if dtype is None:
        return {}
    kept = {f"{name}.s" for name in factor_layers(model)} if dtype.itemsize < 4 else set()
    return {name: dtype for name, t in tensors.items() if t.is_floating_point() and name not in kept}
