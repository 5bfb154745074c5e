"""What a factorized Hugging Face model writes about itself, whoever saves it.

Transformers reads a folder by its config.json alone. Under the config of the stock architecture it would pass over the
factors and draw fresh dense weights, with no more than a printed report. So `save_pretrained` of a factorized model,
which trainers call, writes a config of another model type, which nothing but `nativerank` takes up:

    every key of the stock config,   "model_type": "nativerank",   "architectures": ["NativerankLlamaForCausalLM"],
    "nativerank": {"version", "model_type": "llama", "architecture": "LlamaForCausalLM",
                   "factors": {"lowrank": {MODULE: rank, ...}, "spectral": {...}}}       modules not named are dense
"""

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nativerank.distributed.wrap import original_class
from nativerank.layers.base import factor_layers
from nativerank.version import __version__

MODEL_TYPE = RECORD = "nativerank"  # the model type, and the key that holds what is ours
CONFIG = "config.json"
GUIDED = "guided"  # a layer whose guide is still there; see `kind_of`


def check_no_adapters(model: nn.Module) -> None:
    """Raises a ValueError for PEFT's adapters, which factors alone would leave out of what is saved or merged."""
    for name, module in model.named_modules():
        if hasattr(module, "get_base_layer"):
            raise ValueError(f"{name} has an adapter; call merge_and_unload() of the PEFT model first")


def kind_of(layer: Any) -> str:
    """The kind of layer that reads this one's tensors; "guided" as long as it has a guide."""
    return GUIDED if getattr(layer, "guide", None) is not None else str(layer.kind)


def factored_config(model: nn.Module) -> dict[str, Any]:
    """The config.json of a factorized model, ready for JSON.

    Args:
        model: with a Hugging Face config, or any other module, of which only the factors are known then.

    Raises:
        ValueError: adapters that are not merged.
    """
    check_no_adapters(model)
    hf: Any = model
    keys = hf.config.to_dict() if hasattr(model, "config") else {"model_type": None}
    factors: dict[str, dict[str, int]] = {}
    for name, layer in factor_layers(model).items():
        factors.setdefault(kind_of(layer), {})[name] = layer.rank
    architecture = original_class(model).__name__
    record = {
        "version": __version__,
        "model_type": keys["model_type"],
        "architecture": architecture,
        "factors": factors,
    }
    for key in ("_name_or_path", "auto_map"):  # where the model came from: not true of this one
        keys.pop(key, None)
    names = {"architectures": [f"Nativerank{architecture}"], "model_type": MODEL_TYPE} if keys["model_type"] else {}
    return {**keys, **names, "dtype": dtype_name(model), RECORD: record}


def dtype_name(model: nn.Module) -> str:
    """What most weights are kept in, as configs spell it: the dtype of the first floating point parameter."""
    found = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(found, torch.float32)).removeprefix("torch.")


def stock_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of the stock config that a factored one was made from."""
    record, ours = config[RECORD], (RECORD, "auto_map")
    own = {"model_type": record["model_type"], "architectures": [record["architecture"]]}
    return {key: value for key, value in config.items() if key not in ours} | own


class SavePretrained:
    """Stands for `save_pretrained` of a factorized model: the stock one, with our config.json in the place of its own.

    The config is written before the weights, so a save that is cut short leaves no folder that transformers misreads.
    It knows its model weakly, or large models would wait for the garbage collector; a copied or unpickled model gets
    one of its own.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self._model(),)

    def __call__(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
        """Writes weights and config into a folder.

        Args:
            save_directory, is_main_process, options: as in transformers; state_dict, max_shard_size, ...

        Raises:
            ValueError: `push_to_hub`, whose upload would begin before the config is right.
        """
        model: Any = self._model()
        if options.get("push_to_hub"):
            raise ValueError("save_pretrained(push_to_hub=True) of a factorized model: call model.push_to_hub(...)")
        # Names stay those of the modules: conversions to older names of the stock weights do not know factors.
        options["save_original_format"] = False
        config = vars(model.config)

        def write_ours(folder: str | Path, **_: Any) -> None:
            config.pop(own, None)  # it is no key of the config
            text = json.dumps(factored_config(model), indent=2) + "\n"
            (Path(folder) / CONFIG).write_text(text, encoding="utf-8")

        # Transformers calls it where there is a config to write: in the first process, and not for adapters alone.
        own = "save_pretrained"
        config[own] = write_ours
        try:
            type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **options)
        finally:
            config.pop(own, None)


def mark_factored(model: nn.Module) -> None:
    """Gives every Hugging Face model in a module that holds factor layers its own `save_pretrained`."""
    for part in _pretrained(model):
        if factor_layers(part):
            part.save_pretrained = SavePretrained(part)


def unmark(model: nn.Module) -> None:
    """Takes it away again where no factor layer is left."""
    for part in _pretrained(model):
        if not factor_layers(part):
            vars(part).pop("save_pretrained", None)


def _pretrained(model: nn.Module) -> list[Any]:
    """The Hugging Face models among the modules; whoever has one has imported transformers, which takes seconds."""
    known = sys.modules.get("transformers.modeling_utils")
    return [m for m in model.modules() if isinstance(m, known.PreTrainedModel)] if known else []
