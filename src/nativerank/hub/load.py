"""A saved model, back: factored folders of ours and stock Hugging Face folders, strictly.

A factored folder names a model type of its own (`nativerank.layers.pretrained` says why), and loading here raises on
any missing or unexpected tensor. Its weights are read into the memory where they stay, so the peak is little above
their size. Stock folders are read by `nativerank.hub.stock`.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nativerank.data.tokenizer import load_tokenizer, tokenizer_hash
from nativerank.hub.companions import TOKENIZER, read_generation_config
from nativerank.hub.stock import load_stock
from nativerank.hub.weights import check_fits, read_folder_header, read_into
from nativerank.layers import factorize_modules
from nativerank.layers.base import factor_layers
from nativerank.layers.pretrained import CONFIG, GUIDED, MODEL_TYPE, RECORD, kind_of, stock_keys
from nativerank.models import allocate, find_architecture, make_hf_config, read_hf_config, skeleton

ADAPTERS = "adapter_config.json"  # PEFT's: what it stands for is more than the weights beside it
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Factors = dict[str, dict[str, int]]  # kind of layer -> module -> rank


def load(folder: str | Path, *, into: nn.Module | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The model saved in a folder, in evaluation mode on the CPU.

    Args:
        folder: a run folder, one written by `nativerank.save`, or a stock Hugging Face folder.
        into: a module of the folder's architecture that takes the weights up, in place: plain, or factorized to the
            same ranks. It keeps its device, precision and mode. Without it a module that has no Hugging Face config
            cannot be built.
        dtype: of the weights in memory, float32 if not given; `s` of spectral layers stays in float32.

    Raises:
        ValueError: not a model folder, an unknown architecture, a damaged or missing file, or tensors that do not fit.
    """
    if dtype is not None and (into is not None or dtype not in DTYPES):
        raise ValueError(f"dtype is one of {', '.join(map(str, DTYPES))} and not given with into, got {dtype}")
    folder = model_folder(Path(folder))
    if into is not None:
        return _load_into(into, folder)
    if not is_factored(read_config(folder)):
        return load_stock(folder, base_config(folder), dtype or torch.float32)
    from nativerank.hub.register import register

    register()
    return fill(outline(folder, dtype), folder)


def look(folder: Path) -> nn.Module:
    """What `load` would return, as shapes alone, after a look at everything but the contents of the weights.

    The names of a stock folder's weights are looked at when they are read: transformers alone knows them.

    Raises:
        ValueError: as `load`.
    """
    folder = model_folder(folder)
    model, stored = outline(folder), read_folder_header(folder)
    if is_factored(read_config(folder)):
        from nativerank.hub.register import register

        register()
        check_fits(model, stored, folder)
    return model.eval()


def fill(model: nn.Module, folder: Path) -> nn.Module:
    """Gives an outline its memory and the weights of its folder, in place.

    Raises:
        ValueError: as `load`, before any memory is taken.
    """
    stored = read_folder_header(folder)
    check_fits(model, stored, folder)
    read_into(allocate(model), stored, folder)
    read_generation_config(model, folder)
    return model.eval()


def _load_into(module: nn.Module, folder: Path) -> nn.Module:
    """Factorizes a module as the folder says and fills it; a folder that does not fit leaves it as it was."""
    config, stored = read_config(folder), read_folder_header(folder)
    factors = _factors(config, folder) if RECORD in config else {}
    if present := factor_layers(module):
        have = {name: (kind_of(layer), layer.rank) for name, layer in present.items()}
        want = {name: (kind, rank) for kind, ranks in factors.items() for name, rank in ranks.items()}
        if different := sorted(name for name in {**have, **want} if have.get(name) != want.get(name)):
            raise ValueError(f"{different[0]} is {have.get(different[0])} in the module, {want.get(different[0])} here")
        factors = {}
    rehearsal = _shapes_of(module)
    _factorize(rehearsal, factors, folder)
    check_fits(rehearsal, stored, folder)
    _factorize(module, factors, folder)
    read_into(module, stored, folder)
    return module


def _shapes_of(module: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying any numbers."""
    known: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    known |= {id(b): b.to("meta") for b in module.buffers()}
    return copy.deepcopy(module, known)


def outline(folder: Path, dtype: torch.dtype | None = None, base: Any = None) -> nn.Module:
    """The model saved in a folder as `load` returns it, but as shapes on the meta device.

    Args:
        folder: run or model folder.
        dtype: as in `load`.
        base: the transformers config to build it from, if not `base_config(folder)`.

    Raises:
        ValueError: not a model folder, or a config that does not hold together.
    """
    folder = model_folder(folder)
    config, base = read_config(folder), base_config(folder) if base is None else base
    factored = is_factored(config)
    name = config[RECORD]["architecture"] if factored else next(iter(config.get("architectures") or []), None)
    try:
        architecture = find_architecture(name, base) if name else None
    except ValueError as error:
        if factored:
            raise ValueError(f"{folder / CONFIG}: {error}") from None
        architecture = None
    model = skeleton(base, architecture, dtype or torch.float32)
    if factored:
        _factorize(model, _factors(config, folder), folder)
    return model


def _factorize(model: nn.Module, factors: Factors, folder: Path) -> None:
    """Puts unfilled factor layers into a model."""
    for kind, ranks in factors.items():
        try:
            factorize_modules(model, kind=kind, overrides=ranks, include=list(ranks), init=None)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG} does not fit the model: {error}") from None


def _factors(config: dict[str, Any], folder: Path) -> Factors:
    """The factor layers that a config names, checked for form.

    Raises:
        ValueError: no such thing, or layers that still have their guide.
    """
    factors = config[RECORD].get("factors") if isinstance(config[RECORD], dict) else None
    whole = isinstance(factors, dict) and all(
        isinstance(ranks, dict) and ranks and all(isinstance(rank, int) for rank in ranks.values())
        for ranks in factors.values()
    )
    if not whole:
        raise ValueError(f"{folder / CONFIG} does not say which modules are factorized, so it is not a config of ours")
    assert factors is not None
    if GUIDED in factors:
        name = next(iter(factors[GUIDED]))
        raise ValueError(f"{folder} was saved while {name} still had its guide; load a later state, without guides")
    return {str(kind): dict(ranks) for kind, ranks in factors.items()}


def is_factored(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a factored Hugging Face model."""
    return config.get("model_type") == MODEL_TYPE


def base_config(folder: Path) -> Any:
    """The transformers config of a run or model folder: of a factored model, of what it was factorized from.

    Raises:
        ValueError: not a model folder, or a config that does not hold together.
    """
    folder = model_folder(folder)
    config = read_config(folder)
    if is_factored(config):
        base = make_hf_config(stock_keys(config), folder / CONFIG)
        base.name_or_path = str(folder)
        return base
    if RECORD in config:
        record = config[RECORD]
        name = record.get("architecture") if isinstance(record, dict) else record
        raise ValueError(f"{folder} holds a {name} without a Hugging Face config; make one and give it as into=")
    return read_hf_config(str(folder))


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
        ValueError: there is none, it is not readable, or not in this version's form; or adapters lie beside it.
    """
    if (folder / ADAPTERS).exists():
        raise ValueError(f"{folder} holds adapters ({ADAPTERS}); load its base model, or merge them with PEFT first")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is not a model folder, its {CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder} is not a model folder: {CONFIG} holds no keys")
    if is_factored(config):
        record = config.get(RECORD)
        named = isinstance(record, dict) and all(isinstance(record.get(k), str) for k in ("model_type", "architecture"))
        if not named:
            raise ValueError(f"{folder / CONFIG} does not name its architecture, so it is not a config of ours")
        _factors(config, folder)
    return config


def tokenizer_fingerprint(folder: Path) -> str | None:
    """The hash of a model's or run's tokenizer, comparable with a data folder's, or None without one."""
    file = model_folder(folder) / TOKENIZER
    return tokenizer_hash(load_tokenizer(file)) if file.exists() else None


def layer_kind(folder: Path) -> str | None:
    """The kind of a run's or model folder's factor layers ("lowrank and spectral" if mixed), None for a dense model.

    Raises:
        ValueError: not a model folder.
    """
    config = read_config(model_folder(folder))
    return " and ".join(sorted(config[RECORD]["factors"])) or None if RECORD in config else None
