"""A saved model, back: factored folders of ours and stock Hugging Face folders, strictly.

Transformers alone would load a factored checkpoint into a stock architecture by ignoring the factors and drawing
fresh dense weights, with no more than a printed report; therefore a factored folder names a model type of its own,
and loading here raises on any missing or unexpected tensor. Stock folders are read by `nativerank.hub.stock`.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from nativerank.data.tokenizer import load_tokenizer, tokenizer_hash
from nativerank.hub.stock import load_stock
from nativerank.hub.weights import named_tensors, read_into
from nativerank.layers import factorize_modules
from nativerank.models import MODEL_TYPE, allocate, make_hf_config, read_hf_config, skeleton

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def load(folder: str | Path) -> nn.Module:
    """The model saved in a folder, in evaluation mode on the CPU.

    Args:
        folder: a run folder, one written by `nativerank.save`, or a stock Hugging Face folder.

    Raises:
        ValueError: not a model folder, a damaged file, or tensors that do not fit the config.
    """
    folder = model_folder(Path(folder))
    base, config = base_config(folder), read_config(folder)
    if config.get("model_type") != MODEL_TYPE:
        return load_stock(folder, base)
    model = outline(folder)
    read_into(named_tensors(allocate(model)), folder / WEIGHTS)
    return model.eval()


def outline(folder: Path) -> nn.Module:
    """The model saved in a folder as `load` returns it, but as shapes on the meta device.

    Raises:
        ValueError: not a model folder, or a config that does not hold together.
    """
    config, model = read_config(model_folder(folder)), skeleton(base_config(folder))
    if config.get("model_type") == MODEL_TYPE:
        factorize_modules(model, kind=config["kind"], overrides=config["ranks"], include=list(config["ranks"]))
    return model


def base_config(folder: Path) -> Any:
    """The transformers config of a run or model folder: of a factored model, of what it was factorized from.

    Raises:
        ValueError: not a model folder, or a config that does not hold together.
    """
    folder = model_folder(folder)
    config = read_config(folder)
    if config.get("model_type") != MODEL_TYPE:
        return read_hf_config(str(folder))
    for key, kind in (("base", dict), ("kind", str), ("ranks", dict)):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{folder / CONFIG} has no {key}, so it is not a config of ours")
    return make_hf_config(config["base"], folder / CONFIG)


def model_folder(path: Path) -> Path:
    """The folder with the weights: the path itself, or the model/ of a run folder.

    Raises:
        ValueError: there is no such folder, or the run has not finished.
    """
    if not path.is_dir():
        raise ValueError(f"no such folder: {path}")
    if (path / CONFIG).exists():
        return path
    if (path / "model").is_dir():
        return path / "model"
    if (path / "metrics.jsonl").exists():
        raise ValueError(f"the run in {path} has not finished, so it has no model/ yet; continue it with --resume auto")
    raise ValueError(f"{path} is neither a run nor a model folder")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ValueError: there is none, or it is not readable.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a model folder, its {CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder} is not a model folder: {CONFIG} holds no keys")
    return config


def tokenizer_fingerprint(folder: Path) -> str | None:
    """The hash of a model's or run's tokenizer, comparable with a data folder's, or None without one."""
    file = model_folder(folder) / TOKENIZER
    return tokenizer_hash(load_tokenizer(file)) if file.exists() else None


def layer_kind(folder: Path) -> str | None:
    """The kind of a run's or model folder's factor layers, None for a dense model.

    Raises:
        ValueError: not a model folder.
    """
    config = read_config(model_folder(folder))
    return str(config.get("kind")) if config.get("model_type") == MODEL_TYPE else None
