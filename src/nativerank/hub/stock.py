"""Stock Hugging Face folders, read by transformers and checked strictly.

Transformers knows what their weights are called: sharded files, tied heads, prefixes that were dropped, experts stored
one by one, buffers of old versions. It fills in fresh numbers for what it misses, with no more than a printed report;
here that is an error, and so is a tensor left over. Weights come from safetensors alone, code never from the folder.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from nativerank.models import find_architecture, one_line

# Masks, positions and rotary tables that old versions saved; they are computed now.
COMPUTED = (".attn.bias", ".masked_bias", ".position_ids", ".rotary_emb.inv_freq")


def load_stock(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a stock folder, in evaluation mode.

    Args:
        folder: holds model.safetensors, or its shards and their index.
        config: its transformers config; the model is the architecture named there, else the causal language model.
        dtype: of the weights in memory, whatever precision is stored.

    Raises:
        ValueError: quantized weights, no safetensors, a damaged file, or tensors that are not exactly the model's.
    """
    auto: Any = architecture_of(config)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder} holds quantized weights; only float32, bfloat16 and float16 can be read")
    try:
        with silence():
            model, info = auto.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # to be told of them
                output_loading_info=True,
            )
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"cannot read the weights in {folder}: {one_line(error)}") from error
    check_complete(folder, info)
    loaded: nn.Module = model
    return loaded


def architecture_of(config: Any) -> Any:
    """The class that reads a stock folder: the one its config names if transformers has it, else by model type."""
    import transformers

    for name in config.architectures or []:
        if hasattr(transformers, name):
            return find_architecture(name, config)
    return transformers.AutoModelForCausalLM


def check_complete(folder: Path, info: dict[str, Any]) -> None:
    """Raises a ValueError unless the folder's tensors are exactly the model's."""
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{folder}: {name} has shape {tuple(found)}, expected {tuple(wanted)}")
    for kind, said in (("missing_keys", "lacks {}"), ("unexpected_keys", "holds {}, which the model does not have")):
        if names := sorted(name for name in info[kind] if not name.endswith(COMPUTED)):
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{folder} {said.format(names[0])}{more}")
    if info["error_msgs"]:
        raise ValueError(f"cannot read the weights in {folder}: {' '.join(info['error_msgs'])[:200]}")


@contextmanager
def silence() -> Iterator[None]:
    """Without transformers' progress bar and report; what matters of it becomes our error."""
    from transformers.utils import logging as hf_logging

    logger = logging.getLogger("transformers")
    level, bar = logger.level, hf_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            hf_logging.enable_progress_bar()
