"""Tensors of a model to and from safetensors files: every parameter once under its first name, persistent buffers.

    file     8 bytes length N, N bytes of JSON {NAME: {"dtype", "shape", "data_offsets"}}, the numbers back to back
    folder   model.safetensors, or shards of it and model.safetensors.index.json with {"weight_map": {NAME: shard}}

Numbers are read into the memory where they stay, with plain reads: a file that is mapped would count twice until the
last copy, and would change the model when somebody changes the file. Loading is strict, and all headers are judged
before the first number is read: a missing or unexpected name, another shape, a file cut short or gone is an error that
names it.
"""

import errno
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nativerank.files import size_in_bytes, umask

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LONGEST_HEADER = 100_000_000  # bytes; what safetensors itself takes
CHUNK_BYTES = 1 << 20  # read at once where numbers cannot be read in place


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes [start, end) of a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once, under their first name) and persistent buffers, detached.

    Raises:
        ValueError: a quantized parameter, which is no plain tensor.
    """
    for name, p in model.named_parameters():
        if is_traceable_wrapper_subclass(p) and not isinstance(p, DTensor):
            raise ValueError(f"{name} is a {type(p).__name__}; save the model before it is quantized")
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    persistent = set(model.state_dict(keep_vars=True))
    tensors |= {name: b for name, b in model.named_buffers() if name in persistent}
    return tensors


# -- writing ------------------------------------------------------------------------------------------------------


def write_tensors(tensors: Mapping[str, Tensor], file: Path, header: dict[str, str] | None = None) -> None:
    """Writes contiguous CPU copies of the tensors, and a few words about them into the file's header.

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, file, header)
        file.chmod(0o666 & ~umask())  # the writer makes it private, and then others of a team cannot load the model
    except SafetensorError as error:  # the writer's name for an operating system error, number and all
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code.group(1)) if code else errno.EIO, str(error), str(file)) from None


def write_folder(
    tensors: Mapping[str, Tensor], folder: Path, max_shard_size: str | int, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Writes tensors into one file, or into shards and their index, one shard in memory at a time.

    Args:
        tensors: by name.
        folder: exists.
        max_shard_size: bytes, or "5GB"; a single tensor above it has a shard for itself.
        dtypes: of tensors that are to be stored in another precision, by name.

    Raises:
        ValueError: a size that cannot be read.
        OSError: the disk is full or a file cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    # The plan counts bytes, so it wants the shapes in the precision that is written; the meta device has no storage.
    shapes = {name: torch.empty(t.shape, dtype=dtypes.get(name, t.dtype), device="meta") for name, t in tensors.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=size_in_bytes("max_shard_size", max_shard_size))
    for name, members in plan.filename_to_tensors.items():
        write_tensors({m: tensors[m].to(shapes[m].dtype) for m in members}, folder / name, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- headers ------------------------------------------------------------------------------------------------------


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """What a safetensors file holds by its header, and the words in it; the numbers stay where they are.

    Raises:
        ValueError: no such file, or one that is damaged or cut short.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little") if size >= 8 else 0
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise ValueError("it is cut short or no safetensors file")
            entries = json.loads(stream.read(length))
        words = entries.pop("__metadata__", {})
        if not (isinstance(words, dict) and all(isinstance(word, str) for word in words.values())):
            raise ValueError("its __metadata__ does not hold words")
        stored = {name: _stored(file, 8 + length, entry) for name, entry in entries.items()}
        _check_layout(stored.values(), 8 + length, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"cannot read {file}: {_cause(error)}") from None
    return stored, words


def _cause(error: Exception) -> str:
    """In words, without the path again."""
    if isinstance(error, KeyError):
        return f"it holds no {error}"
    return str(getattr(error, "strerror", None) or error)


def _stored(file: Path, origin: int, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"it holds numbers of type {entry['dtype']!r}")
    start, end = map(int, entry["data_offsets"])
    return StoredTensor(
        file, SAFETENSORS_DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), origin + start, origin + end
    )


def _check_layout(stored: Iterable[StoredTensor], origin: int, size: int) -> None:
    """Raises a ValueError unless the tensors lie back to back from `origin` to the end of the file."""
    end = origin
    for t in sorted(stored, key=lambda t: (t.start, t.end)):
        if min(t.shape, default=0) < 0 or t.start != end or t.end != t.start + math.prod(t.shape) * t.dtype.itemsize:
            raise ValueError("its header does not describe its contents")
        end = t.end
    if end != size:
        raise ValueError(f"it has {size} bytes, and {end} by its header")


def read_folder_header(folder: Path) -> dict[str, StoredTensor]:
    """What the weight file of a folder holds, or its shards together.

    Raises:
        ValueError: no weights, a shard that is missing or damaged, or an index that is not that of the shards.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return read_header(folder / WEIGHTS)[0]
    try:
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not (isinstance(where, dict) and all(isinstance(name, str) for name in where.values())):
            raise ValueError("its weight_map does not name a file for every tensor")
        files = sorted(set(where.values()))
        if any(Path(name).name != name for name in files):
            raise ValueError("it names files outside the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read {folder / INDEX}: {_cause(error)}") from None
    if gone := [name for name in files if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {gone[0]}{_more(gone)}, which its index names; was it copied whole?")
    stored: dict[str, StoredTensor] = {}
    for name in files:
        for tensor, entry in read_header(folder / name)[0].items():
            if where.get(tensor) == name:
                stored[tensor] = entry
            elif tensor not in where:
                raise ValueError(f"{folder / name} holds {tensor}, which the index does not name")
    if lost := sorted(set(where) - set(stored)):
        raise ValueError(f"{folder / where[lost[0]]} lacks {lost[0]}{_more(lost)}, which its index promises")
    return stored


# -- reading ------------------------------------------------------------------------------------------------------


def check_fits(model: nn.Module, stored: Mapping[str, StoredTensor], where: Path) -> dict[str, str]:
    """The stored name of every tensor of a model, which tied ones may bear under any of theirs.

    Args:
        model: on any device, also the meta device.
        stored: from `read_folder_header`.
        where: to be named.

    Raises:
        ValueError: a name that is missing or left over, or another shape.
    """
    tensors, aliases = named_tensors(model), _aliases(model)
    found = {name: next((a for a in aliases.get(name, [name]) if a in stored), None) for name in tensors}
    if missing := sorted(name for name, alias in found.items() if alias is None):
        raise ValueError(f"{where} lacks {missing[0]}{_more(missing)}")
    known = set(tensors).union(*aliases.values())
    if extra := sorted(set(stored) - known):
        raise ValueError(f"{where} holds {extra[0]}, which the model does not have{_more(extra, ', and')}")
    fitting = {name: alias for name, alias in found.items() if alias is not None}
    for name, alias in fitting.items():
        have, want = stored[alias], tensors[name]
        if have.shape != tuple(want.shape):
            raise ValueError(f"{where}: {name} has shape {have.shape}, expected {tuple(want.shape)}")
        if have.dtype.is_floating_point != want.is_floating_point():
            raise ValueError(f"{where}: {name} holds {have.dtype}, expected {want.dtype}")
    return fitting


@torch.no_grad()
def read_into(model: nn.Module, stored: Mapping[str, StoredTensor], where: Path) -> None:
    """Fills a model's parameters and buffers, in their own precision and on their own device.

    Args:
        model: has memory.
        stored, where: as in `check_fits`.

    Raises:
        ValueError: as `check_fits`, before anything is changed; or a file that changed meanwhile.
    """
    tensors, names = named_tensors(model), check_fits(model, stored, where)
    wanted = sorted(((stored[names[name]], t) for name, t in tensors.items()), key=lambda w: (w[0].file, w[0].start))
    stream: BinaryIO | None = None
    try:
        for entry, target in wanted:
            if stream is None or Path(stream.name) != entry.file:
                if stream is not None:
                    stream.close()
                stream = open(entry.file, "rb", buffering=0)
            stream.seek(entry.start)
            _read_tensor(stream, entry, target)
    except OSError as error:
        raise ValueError(f"cannot read {where}: {error}") from None
    finally:
        if stream is not None:
            stream.close()


def _read_tensor(stream: BinaryIO, entry: StoredTensor, target: Tensor) -> None:
    """The numbers at the stream's position into a tensor: in place where they are what they shall be."""
    if target.device.type == "cpu" and target.dtype == entry.dtype and target.is_contiguous():
        _read_exactly(stream, memoryview(target.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]  # numpy arrays are buffers
        return
    flat = target.reshape(-1) if target.is_contiguous() else torch.empty(target.numel(), dtype=target.dtype)
    step = CHUNK_BYTES // entry.dtype.itemsize
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step]
        buffer = bytearray(part.numel() * entry.dtype.itemsize)
        _read_exactly(stream, memoryview(buffer))
        part.copy_(torch.frombuffer(buffer, dtype=entry.dtype))
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


def _read_exactly(stream: BinaryIO, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])  # type: ignore[attr-defined]  # of a raw file
        if not count:
            raise OSError(errno.EIO, "the file became shorter while it was read", stream.name)
        done += count


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name -> all names, of parameters that stand in several places."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {group[0]: group for group in names.values() if len(group) > 1}


def _more(names: list[str], joint: str = " and") -> str:
    return f"{joint} {len(names) - 1} more" if len(names) > 1 else ""
