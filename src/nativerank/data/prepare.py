"""From inputs to a prepared folder: choose the validation documents, train or load the tokenizer, encode, write.

The result depends on the inputs, the tokenizer, the seed and the fraction, never on the number of processes. A document
is a validation document when a hash of (seed, text) falls below val_fraction: the order of the inputs does not matter,
and two copies of a text land on the same side. The tokenizer sees training documents only.
"""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nativerank.data.encode import Encoder, document_draws, encode_documents
from nativerank.data.progress import ByteProgress
from nativerank.data.shards import (
    SHARD_TOKENS,
    SPLITS,
    ShardWriter,
    read_manifest,
    token_dtype,
    write_manifest,
)
from nativerank.data.sources import Source, open_sources
from nativerank.data.tokenizer import (
    FILE_NAME,
    end_of_text_id,
    load_tokenizer,
    plain_text_only,
    tokenizer_hash,
    train_bpe,
    vocab_size,
)
from nativerank.files import new_folder

TRAIN = "train:"
SAMPLE_BYTES = 200_000_000
# Reading twice is cheap below this, so an unlucky draw of the validation documents can be seen and mended.
SCAN_BYTES = 64_000_000
# Below this, one process is done before a second one has started.
SPAWN_BYTES = 4_000_000


def prepare(
    inputs: list[str],
    out: str | Path,
    tokenizer: str = "train:4096",
    val_fraction: float = 0.05,
    seed: int = 0,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    field: str = "text",
    chunk_bytes: int | None = None,
    eot: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes a prepared folder and returns a summary of it.

    Args:
        inputs: files, folders, hub:OWNER/NAME, each with ::WEIGHT for a mixture.
        out: folder to make; it must not hold anything.
        tokenizer: "train:N" trains a byte-level BPE of N tokens; else a tokenizer.json or a folder with one.
        val_fraction: expected share of validation documents; 0 for none.
        seed: of the validation split.
        workers: processes that encode; None takes all cores, 1 stays in this process (and its threads).
        shard_tokens: tokens of a full shard file.
        field: name of the text field or column.
        chunk_bytes: plain text files longer than this are cut into several documents.
        eot: the tokenizer's end-of-text token, if it has none of the usual names.
        quiet: no progress.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must lie in [0, 1), got {val_fraction}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    started, out = time.monotonic(), Path(out)
    num_tokens = _vocab_to_train(tokenizer)
    source = open_sources(inputs, field, chunk_bytes)
    # First of all, so that an occupied folder or a full disk is known before the work.
    with new_folder(out) as folder:
        threshold = _threshold(source, val_fraction, seed)
        if num_tokens is None:
            bpe = load_tokenizer(tokenizer)
        else:
            bpe = _train(source, num_tokens, threshold, seed, quiet)
        eot_id = end_of_text_id(bpe, eot)
        encoder = Encoder(bpe.to_str(), vocab_size(bpe), eot_id, seed, threshold)
        splits = _write(source, encoder, folder, shard_tokens, _workers(workers, source), quiet)
        _check_split(splits, val_fraction, source)
        manifest = {
            "dtype": token_dtype(encoder.vocab_size).name,
            "vocab_size": encoder.vocab_size,
            "eot_id": eot_id,
            "tokenizer_sha256": _save_tokenizer(bpe, folder),
            "val_fraction": val_fraction,
            "seed": seed,
            "sources": list(inputs),
            "splits": splits,
        }
        write_manifest(folder, manifest)
    if num_tokens is not None and encoder.vocab_size < num_tokens:
        source.notes.append(f"the text gave a vocabulary of {encoder.vocab_size} tokens, not {num_tokens}")
    return summary(out) | {"notes": source.notes, "seconds": round(time.monotonic() - started, 2)}


def summary(path: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder without the list of shards, with the ratio of bytes to tokens."""
    manifest = read_manifest(Path(path))
    splits = {name: {**entry, "shards": len(entry["shards"])} for name, entry in manifest["splits"].items()}
    words = sum(entry["tokens"] - entry["documents"] for entry in splits.values())
    ratio = sum(entry["text_bytes"] for entry in splits.values()) / max(1, words)
    return {"path": str(path), **manifest, "splits": splits, "bytes_per_token": round(ratio, 3)}


def _vocab_to_train(tokenizer: str) -> int | None:
    """N of "train:N"; None for a path."""
    if not tokenizer.startswith(TRAIN):
        return None
    number = tokenizer.removeprefix(TRAIN)
    if not number.isdecimal():
        raise ValueError(f"tokenizer must be train:N or a path, got {tokenizer!r}")
    return int(number)


def _threshold(source: Source, val_fraction: float, seed: int) -> float:
    """val_fraction, or just above the smallest draw where a small corpus has none below val_fraction."""
    if val_fraction == 0 or source.text_bytes is None or source.text_bytes > SCAN_BYTES:
        return val_fraction
    smallest = min(document_draws(document, seed)[0] for document in source)
    if smallest < val_fraction:
        return val_fraction
    source.notes.append(f"chance put no document into the {val_fraction:.3g} of validation; one was taken")
    return smallest + 2**-53


def _train(source: Source, size: int, threshold: float, seed: int, quiet: bool) -> Tokenizer:
    """A tokenizer from a sample of the training documents, spread over the source where its size is known."""
    share = min(1.0, SAMPLE_BYTES / max(1, source.text_bytes or 0))
    with ByteProgress("tokenizer", source.text_bytes or SAMPLE_BYTES, quiet) as progress:

        def sample() -> Iterator[str]:
            for document in source:
                progress.advance(len(document))
                split, taken = document_draws(document, seed)
                if split >= threshold and taken < share:
                    yield document

        return train_bpe(sample(), size, SAMPLE_BYTES)


def _workers(workers: int | None, source: Source) -> int:
    if workers is not None:
        return workers
    if source.text_bytes is not None and source.text_bytes < SPAWN_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(
    source: Source, encoder: Encoder, folder: Path, shard_tokens: int, workers: int, quiet: bool
) -> dict[str, dict[str, Any]]:
    """Encodes and writes all documents; returns the manifest's entries of the splits."""
    with ExitStack() as stack:
        progress = stack.enter_context(ByteProgress("encode", source.text_bytes, quiet))
        writers = {n: stack.enter_context(ShardWriter(folder, n, encoder.vocab_size, shard_tokens)) for n in SPLITS}
        for batch in encode_documents(source, encoder, workers):
            for name, part in batch.items():
                writers[name].write(*part)
                progress.advance(part.text_bytes)
        return {name: writer.close() for name, writer in writers.items()}


def _check_split(splits: dict[str, dict[str, Any]], val_fraction: float, source: Source) -> None:
    """Both splits hold documents, unless no validation was asked for."""
    empty = [n for n in SPLITS if not splits[n]["documents"] and (n == "train" or val_fraction > 0)]
    if empty:
        documents = sum(entry["documents"] for entry in splits.values())
        raise ValueError(
            f"the {empty[0]} split is empty: {source.name} gave {documents} document(s), none of them for it with "
            f"val_fraction {val_fraction}; give more text, a smaller chunk_bytes, another seed, or val_fraction 0"
        )


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    plain_text_only(tokenizer)
    (folder / FILE_NAME).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return tokenizer_hash(folder)
