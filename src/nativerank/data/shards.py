"""Prepared data: a folder of token shards with a manifest.

    manifest.json   tokenizer.json   train-00000.bin ...   val-00000.bin ...

A shard is raw little-endian uint16 (vocab_size <= 65536) or uint32. The stream of a split is its shards one after the
other: EOT doc EOT doc ..., the end-of-text id before each document, so that every token of text is predicted from
something. The folder appears under its name only when complete. Reading maps the files, it does not load them.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nativerank.data.integrity import damaged
from nativerank.data.progress import ByteProgress
from nativerank.data.tokenizer import FILE_NAME, load_tokenizer, tokenizer_hash

FORMAT, VERSION = "nativerank-shards", 1
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000
MANIFEST = "manifest.json"


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype that holds every id, little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Writes one split, a full shard after the other; holds nothing but what the last `write` brought.

    Args:
        folder: where the shards go.
        split: "train" or "val".
        vocab_size: decides the dtype.
        shard_tokens: tokens of a full shard; documents run on across shards.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS):
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.tokens = self.documents = self.text_bytes = 0
        self.shards: list[dict[str, Any]] = []
        self._file: Any = None

    def write(self, tokens: np.ndarray, documents: int, text_bytes: int) -> None:
        """Appends tokens, which hold so many documents of so many UTF-8 bytes in all."""
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += len(tokens)
        while len(tokens):
            if self._file is None:
                self._open()
            free = self.shard_tokens - self.shards[-1]["tokens"]
            data = np.ascontiguousarray(tokens[:free], dtype=self.dtype)
            self._file.write(data.data)
            self._digest.update(data.data)
            self.shards[-1]["tokens"] += len(data)
            tokens = tokens[free:]
            if self.shards[-1]["tokens"] == self.shard_tokens:
                self._finish()

    def close(self) -> dict[str, Any]:
        """Finishes the last shard and returns the manifest entry of the split."""
        self._finish()
        counts = {"tokens": self.tokens, "documents": self.documents, "text_bytes": self.text_bytes}
        return {**counts, "shards": self.shards}

    def _open(self) -> None:
        name = f"{self.split}-{len(self.shards):05d}.bin"
        self._file = open(self.folder / name, "wb")
        self._digest = hashlib.sha256()
        self.shards.append({"file": name, "tokens": 0, "sha256": ""})

    def _finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.shards[-1]["sha256"] = self._digest.hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        """Lets go of a file that was not finished."""
        if self._file is not None:
            with suppress(OSError):  # the flush on a full disk fails again; the folder is removed anyway
                self._file.close()
            self._file = None


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json, the last file of a folder."""
    whole = {"format": FORMAT, "version": VERSION, **manifest}
    (folder / MANIFEST).write_text(json.dumps(whole, indent=2), encoding="utf-8")


class Split:
    """The token stream of one split, read by position.

    Args:
        folder: the prepared folder.
        entry: the split's part of the manifest.
        dtype: of the shards.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any], dtype: np.dtype):
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self.text_bytes: int = entry["text_bytes"]
        self._files = [(folder / s["file"], s["tokens"]) for s in entry["shards"]]
        self._starts = np.cumsum([0] + [tokens for _, tokens in self._files])  # shard i holds starts[i]..starts[i+1]
        self._dtype = dtype
        self._maps: dict[int, np.ndarray] = {}

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count as int64, across shard boundaries."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start}..{start + count} asked of a split with {self.tokens}")
        out = np.empty(count, dtype=np.int64)
        shard, done = int(np.searchsorted(self._starts, start, side="right")) - 1, 0
        while done < count:
            inside = start + done - int(self._starts[shard])
            piece = self._shard(shard)[inside : inside + count - done]
            out[done : done + len(piece)] = piece
            done, shard = done + len(piece), shard + 1
        return out

    def _shard(self, index: int) -> np.ndarray:
        if index not in self._maps:
            path, tokens = self._files[index]
            self._maps[index] = np.memmap(path, dtype=self._dtype, mode="r", shape=(tokens,))
        return self._maps[index]


class Dataset:
    """A prepared folder, opened with `Dataset.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.eot_id: int = manifest["eot_id"]
        self.tokenizer_sha256: str = manifest["tokenizer_sha256"]

    @classmethod
    def open(cls, path: str | Path) -> "Dataset":
        """Checks the manifest, all sizes, and the sha256 of every shard not yet found good.

        Raises:
            ValueError: no prepared folder, or a shard that is missing, truncated or altered (named).
        """
        dataset = cls(Path(path), read_manifest(Path(path)))
        dataset._check(fresh=False)
        return dataset

    def split(self, name: str) -> Split:
        """The "train" or the "val" stream."""
        if name not in self.manifest["splits"]:
            raise ValueError(f"unknown split {name!r}; {self.path} has {', '.join(self.manifest['splits'])}")
        return Split(self.path, self.manifest["splits"][name], np.dtype(self.manifest["dtype"]).newbyteorder("<"))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        file = self.path / FILE_NAME
        tokenizer = load_tokenizer(file)
        if tokenizer_hash(file) != self.tokenizer_sha256:
            raise ValueError(f"{file} is a tokenizer other than the one the shards were made with")
        return tokenizer

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with; ValueError if the file is another one."""
        return self._tokenizer

    def _check(self, fresh: bool, quiet: bool = True) -> None:
        itemsize = np.dtype(self.manifest["dtype"]).itemsize
        shards = [s for entry in self.manifest["splits"].values() for s in entry["shards"]]
        expected = {s["file"]: (s["tokens"] * itemsize, s["sha256"]) for s in shards}
        with ByteProgress("verify", sum(size for size, _ in expected.values()), quiet) as progress:
            problems = damaged(self.path, expected, fresh, progress.advance)
        if problems:
            raise ValueError("; ".join(problems))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a prepared folder, checked for form."""
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{path} is not a prepared data folder; make one with: nativerank data prepare INPUT --out {path}"
        )
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise ValueError(f"format {manifest['format']!r}, version {manifest['version']!r}")
        if manifest["dtype"] != ("uint16" if manifest["vocab_size"] <= 1 << 16 else "uint32"):
            raise ValueError(f"dtype {manifest['dtype']!r} for a vocabulary of {manifest['vocab_size']}")
        for name in SPLITS:
            entry = manifest["splits"][name]
            if entry["tokens"] != sum(s["tokens"] for s in entry["shards"]):
                raise ValueError(f"the shards of {name} do not add up to {entry['tokens']} tokens")
        manifest["eot_id"], manifest["tokenizer_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{file} is not a manifest this version reads ({FORMAT} {VERSION}): {reason}") from None
    return manifest


def verify(path: str | Path, quiet: bool = True) -> Dataset:
    """Hashes everything again, with progress unless `quiet`; ValueError names every file that is missing, truncated or
    altered.
    """
    dataset = Dataset(Path(path), read_manifest(Path(path)))
    dataset._check(fresh=True, quiet=quiet)
    dataset.tokenizer()
    return dataset
