"""Tensors of a model to and from safetensors: every parameter once under its first name, persistent buffers, no code.

Loading is strict: a missing or unexpected name, or another shape, is an error that names it.
"""

import errno
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once, under their first name) and persistent buffers, detached."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    persistent = set(model.state_dict(keep_vars=True))
    tensors |= {name: b for name, b in model.named_buffers() if name in persistent}
    return tensors


def write_tensors(tensors: dict[str, Tensor], file: Path, header: dict[str, str] | None = None) -> None:
    """Writes contiguous CPU copies of the tensors, and a few words about them into the file's header.

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, file, header)
    except SafetensorError as error:  # the writer's name for an operating system error, number and all
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code.group(1)) if code else errno.EIO, str(error), str(file)) from None


def read_into(tensors: dict[str, Tensor], file: Path) -> None:
    """Copies a file's tensors into existing ones of the same names and shapes.

    Raises:
        ValueError: the file is damaged, or its names or shapes are not exactly these.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            found = set(stored.keys())
            _compare(set(tensors), found, file)
            for name, target in tensors.items():
                value = stored.get_tensor(name)
                if value.shape != target.shape:
                    raise ValueError(f"{file}: {name} has shape {tuple(value.shape)}, expected {tuple(target.shape)}")
                with torch.no_grad():
                    target.copy_(value)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None


def _compare(expected: set[str], found: set[str], file: Path) -> None:
    if missing := sorted(expected - found):
        raise ValueError(f"{file} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    if extra := sorted(found - expected):
        raise ValueError(
            f"{file} holds {extra[0]}, which the model does not have"
            + (f", and {len(extra) - 1} more" if len(extra) > 1 else "")
        )
