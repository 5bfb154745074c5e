"""Pieces of tensors to and from safetensors files, a file per process.

    __metadata__.DCP_SHARDING_INFO   {NAME: {"saved_offsets": [3, 0], "shape": [6, 5]}}   JSON in the header

NAME's tensor in the file is the part of a (6, 5) whole that begins at (3, 0); a file of wholes only has no such header.
PyTorch's `HuggingFaceStorageReader` reads these files. They are not written and read through it because it does not
keep the shape of the whole, and leaves in memory what was there where a piece is missing (torch 2.13); here pieces must
tile the whole.

One process reads the headers of all files and tells the others (`Stored` can be pickled); each then opens only the
files that hold something of what it holds, and reads those slices.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nativerank.distributed.pieces import Piece
from nativerank.hub.weights import read_header, write_tensors

HEADER = "DCP_SHARDING_INFO"
Sizes = tuple[int, ...]


def write_pieces(pieces: Iterable[Piece], file: Path) -> None:
    """Writes the pieces that are this process's to write.

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    own = [p for p in pieces if p.writes and (p.along is None or p.start == 0 or p.tensor.numel())]
    cut = {p.name: {"saved_offsets": list(begin(p)), "shape": list(p.shape)} for p in own}
    whole = all(p.along is None for p in own)
    write_tensors({p.name: p.tensor for p in own}, file, None if whole else {HEADER: json.dumps(cut)})


def begin(piece: Piece) -> Sizes:
    """Where a piece begins in the whole, in each dimension."""
    return tuple(piece.start if d == piece.along else 0 for d in range(len(piece.shape)))


@dataclass(frozen=True)
class StoredPart:
    """What one file holds of a tensor: `size` from `begin` on."""

    file: Path
    begin: Sizes
    size: Sizes


class Stored:
    """The tensors that files hold together.

    Args:
        files: of one kind, of all processes.

    Attributes:
        shapes: of every whole tensor.

    Raises:
        ValueError: a file that is damaged; pieces that overlap or leave a gap, named.
    """

    def __init__(self, files: Sequence[Path]):
        self.where = files[0] if len(files) == 1 else files[0].parent
        self.shapes: dict[str, Sizes] = {}
        self._parts: dict[str, list[StoredPart]] = {}
        for file in files:
            for name, (shape, part) in _parts_of(file).items():
                if self.shapes.setdefault(name, shape) != shape:
                    raise ValueError(f"{file} is damaged: {name} is {shape} there and {self.shapes[name]} elsewhere")
                self._parts.setdefault(name, []).append(part)
        for name, parts in self._parts.items():
            if not _tile(parts, self.shapes[name]):
                raise ValueError(f"{self.where} is damaged: the pieces of {name} leave a gap or overlap")

    def check(self, pieces: Sequence[Piece]) -> None:
        """Raises a ValueError for a piece that is not here or has another shape."""
        if missing := [p.name for p in pieces if p.name not in self.shapes]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{self.where} lacks {min(missing)}{more}")
        for p in pieces:
            if self.shapes[p.name] != tuple(p.shape):
                raise ValueError(f"{self.where}: {p.name} has shape {self.shapes[p.name]}, expected {tuple(p.shape)}")

    @torch.no_grad()
    def fill(self, pieces: Iterable[Piece]) -> None:
        """Copies what is stored into the pieces' tensors.

        Raises:
            ValueError: as `check`, or a damaged file.
        """
        pieces = list(pieces)
        self.check(pieces)
        wanted: dict[Path, list[tuple[Piece, StoredPart]]] = {}
        for p in pieces:
            for part in self._parts[p.name]:
                wanted.setdefault(part.file, []).append((p, part))
        for file, reads in wanted.items():
            with _opened(file) as stored:
                for piece, part in reads:
                    _copy(stored, piece, part)


def _copy(stored: Any, piece: Piece, part: StoredPart) -> None:
    """What a part and a piece have in common, from a file into the piece."""
    target, source = [], []
    size: Sizes = tuple(piece.tensor.shape)
    for at, length, there, stretch in zip(begin(piece), size, part.begin, part.size, strict=True):
        first, last = max(at, there), min(at + length, there + stretch)
        if first >= last:
            return
        target.append(slice(first - at, last - at))
        source.append(slice(first - there, last - there))
    everything = all((s.start, s.stop) == (0, n) for s, n in zip(source, part.size, strict=True))
    value: Tensor = stored.get_tensor(piece.name) if everything else stored.get_slice(piece.name)[tuple(source)]
    piece.tensor[tuple(target)].copy_(value)


def _parts_of(file: Path) -> dict[str, tuple[Sizes, StoredPart]]:
    """name -> (shape of the whole, what of it lies here), from the header alone."""
    stored, words = read_header(file)
    sizes, header = {name: tensor.shape for name, tensor in stored.items()}, words.get(HEADER)
    try:
        cut = {} if header is None else json.loads(header)
        found = {}
        for name, size in sizes.items():
            entry = cut[name] if header is not None else {"saved_offsets": [0] * len(size), "shape": size}
            start, shape = tuple(map(int, entry["saved_offsets"])), tuple(map(int, entry["shape"]))
            if not len(start) == len(shape) == len(size) or min((*start, *shape), default=0) < 0:
                raise ValueError(name)
            found[name] = (shape, StoredPart(file, start, size))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{file} is damaged: its header does not say where its tensors belong") from None
    return found


def _tile(parts: list[StoredPart], shape: Sizes) -> bool:
    """Whether parts, cut along one dimension, are the whole and nothing twice."""
    along = {d for part in parts for d, size in enumerate(part.size) if size != shape[d] or part.begin[d]}
    if len(along) > 1 or (not along and len(parts) > 1 and 0 not in shape):
        return False
    end = 0
    for d in along:
        for part in sorted(parts, key=lambda part: (part.begin[d], part.size[d])):
            if part.begin[d] != end:
                return False
            end += part.size[d]
        return end == shape[d]
    return True


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An open safetensors file, whose errors name it."""
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
