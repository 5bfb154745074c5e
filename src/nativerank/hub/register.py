"""Transformers' Auto classes, taught to read factored folders.

    nr.register()
    AutoModelForCausalLM.from_pretrained("runs/x/model")      pipeline("text-generation", model="runs/x/model")

The model type of these folders gets a config class, and every AutoModel class one that loads them strictly, as
`nativerank.load` does, and returns the stock architecture holding our layers: there is no class of our own around it,
so optimizers, trainers and generation see what they know. Where nativerank is not installed, a folder with a LLaMA
language model brings its own code along (`modeling_nativerank.py`).
"""

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from nativerank.hub.load import DTYPES, base_config, fill, outline, read_config
from nativerank.layers.pretrained import MODEL_TYPE, RECORD

# Where weights come from and how they are read, which is decided here; and what says nothing about a model.
IGNORED = (
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "force_download",
    "low_cpu_mem_usage",
    "proxies",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
)
DOWNLOAD = ("cache_dir", "local_files_only", "revision", "token")


class NativerankConfig(PreTrainedConfig):
    """The config of a factored folder: all keys of the stock config, and `nativerank` with what is factorized."""

    model_type = MODEL_TYPE


class FactoredModel:
    """Stands in the table of an AutoModel class for the architectures of all factored folders; never instantiated."""

    config_class = NativerankConfig
    auto: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        output_loading_info: bool = False,
        subfolder: str | None = None,
        **others: Any,
    ) -> Any:
        """The folder's model, or its base model where the Auto class asks for that; in evaluation mode.

        Args:
            path: a factored folder, or its name on the Hub.
            config: a NativerankConfig; what was changed in it is changed in the model's.
            dtype, torch_dtype: of the weights; "auto" or None are what is stored.
            device_map: a device for the whole model, or "auto": a GPU if there is one.
            attn_implementation: as in transformers.
            output_loading_info: return a pair with the report, which is empty: what does not fit raises.
            subfolder: of the path, where the model lies.
            others: keys of the config and their values; where to download from.

        Raises:
            ValueError: an argument that cannot be honoured, an architecture that is not of the Auto class's kind, or
                whatever `nativerank.load` raises.
        """
        folder = _local(path, {k: v for k, v in others.items() if k in DOWNLOAD}) / (subfolder or "")
        base = base_config(folder)
        given = {k: v for k, v in others.items() if v is not None and k not in (*IGNORED, *DOWNLOAD)}
        if refused := sorted(given.keys() - base.to_dict().keys()):
            raise ValueError(f"{refused[0]} is no option for a factored folder, and no key of its config")
        if config is not None:
            _take_changes(base, config, folder)
        for key, value in given.items():
            setattr(base, key, value)
        if attn_implementation is not None:
            base._attn_implementation = attn_implementation
        base.name_or_path = str(path)
        stored = getattr(config, "dtype", None) or read_config(folder).get("dtype")
        model = outline(folder, _dtype(dtype or torch_dtype, stored), base)
        part = cls._part_of(model, base)
        fill(model, folder)
        part.to(_device(device_map))
        nothing: dict[str, Any] = {
            key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        }
        return (part, nothing) if output_loading_info else part

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> nn.Module:
        raise ValueError("a factored model is made by nativerank.factorize, or loaded by from_pretrained")

    @classmethod
    def _part_of(cls, model: Any, base: Any) -> Any:
        """The model or its base model, whichever the Auto class lists for this kind of config."""
        listed = cls.auto._model_mapping.get(type(base), ())
        classes = listed if isinstance(listed, list | tuple) else (listed,)
        for part in (model, model.base_model):
            if type(part) in classes:
                return part
        raise ValueError(f"{cls.auto.__name__} does not read a {type(model).__name__}, which the folder holds")


@cache
def register() -> None:
    """Makes transformers' Auto classes and pipelines read factored folders; calling it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, NativerankConfig, exist_ok=True)
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            reader: Any = type(f"Nativerank{name.removeprefix('Auto')}", (FactoredModel,), {"auto": auto})
            auto.register(NativerankConfig, reader, exist_ok=True)


def _local(path: str | Path, options: dict[str, Any]) -> Path:
    """The folder, downloaded if it is none of this machine's."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"], **options))


def _take_changes(base: Any, config: Any, folder: Path) -> None:
    """Repeats in the stock config what somebody changed in ours."""
    untouched = NativerankConfig(**read_config(folder)).to_dict()
    for key, value in config.to_dict().items():
        if key not in (RECORD, "model_type", "architectures", "dtype") and untouched.get(key) != value:
            setattr(base, key, value)
    if config._attn_implementation is not None:
        base._attn_implementation = config._attn_implementation


def _dtype(asked: Any, stored: Any) -> torch.dtype:
    """The precision asked for, by name or itself, else the stored one."""
    chosen = (stored or torch.float32) if asked in (None, "auto") else asked
    found = getattr(torch, chosen, None) if isinstance(chosen, str) else chosen
    if found not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(map(str, DTYPES))}, got {chosen!r}")
    return found


def _device(device_map: Any) -> torch.device:
    """The one device of a device map."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device_map is None or isinstance(device_map, str | int | torch.device):
        try:
            return torch.device("cpu" if device_map is None else device_map)
        except RuntimeError:
            pass
    raise ValueError(f"device_map is a device or 'auto' for a factored folder, got {device_map!r}")


__all__ = ["FactoredModel", "NativerankConfig", "register"]
