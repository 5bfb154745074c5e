"""Documents from what a user names: files, folders, hub data sets, and weighted mixtures of them.

    INPUT                                                    a file or a folder (recursively, in sorted order)
    hub:OWNER/NAME?name=CONFIG&split=train&field=text        streamed from the Hugging Face hub (or a local folder)
    INPUT::WEIGHT                                            share of the bytes in a mixture

A `Source` can be read many times and gives the same documents in the same order each time. Memory stays bounded by
one piece of a file, whatever its size.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from urllib.parse import parse_qsl

from nativerank.data.readers import (
    SUPPORTED,
    TEXT,
    Document,
    estimated_bytes,
    field_text,
    file_documents,
    file_kind,
)
from nativerank.extras import require

HUB = "hub:"
HUB_KEYS = ("name", "split", "field", "revision", "documents")
CHUNK_BYTES = 1 << 20
# One small text file must still give enough documents for a validation split.
FEW_DOCUMENTS, MANY_DOCUMENTS, SMALLEST_CHUNK_BYTES = 20, 200, 2048


@dataclass
class Source:
    """A stream of documents that can be started again.

    Args:
        name: as the user wrote it, for messages and the manifest.
        documents: starts a fresh pass.
        text_bytes: about how much text there is (for progress and sampling); None when unknown.
        notes: what the user should hear; a pass may add to it.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    text_bytes: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[Document]:
        documents = self.documents()
        first = next(documents, None)
        if first is None:
            raise ValueError(f"no text in {self.name}")
        yield first
        yield from documents


def open_source(spec: str, field: str = "text", chunk_bytes: int | None = None) -> Source:
    """One file, folder or hub data set."""
    if spec.startswith(HUB):
        return hub_source(spec, field)
    files = list_files(spec)
    note = None
    if chunk_bytes is None:
        chunk_bytes, note = suggested_chunk_bytes(files)
    return file_source(spec, files, field, chunk_bytes, [note] if note else [])


def open_sources(inputs: Sequence[str], field: str = "text", chunk_bytes: int | None = None) -> Source:
    """All inputs as one source: one after the other, or mixed by bytes where every input carries a ::WEIGHT."""
    if not inputs:
        raise ValueError("no input given: name a .txt, .jsonl or .parquet file, a folder, or hub:OWNER/NAME")
    if chunk_bytes is not None and chunk_bytes < 64:
        raise ValueError(f"chunk_bytes must be at least 64, got {chunk_bytes}")
    parsed = [split_weight(spec) for spec in inputs]
    weighted = [weight for _, weight in parsed if weight is not None]
    if weighted and len(weighted) < len(parsed):
        bare = next(spec for spec, weight in parsed if weight is None)
        raise ValueError(f"either every input carries a ::WEIGHT or none does; {bare} has none")
    files = {spec: list_files(spec) for spec, _ in parsed if not spec.startswith(HUB)}
    notes: list[str] = []
    if chunk_bytes is None:
        local = len(files) == len({spec for spec, _ in parsed})
        chunk_bytes, note = suggested_chunk_bytes(list(chain(*files.values()))) if local else (CHUNK_BYTES, None)
        notes += [note] if note else []
    sources = [
        file_source(s, files[s], field, chunk_bytes, []) if s in files else hub_source(s, field) for s, _ in parsed
    ]
    source = mix(list(zip(sources, weighted, strict=True))) if weighted else concatenate(sources)
    source.notes += notes
    return source


def split_weight(spec: str) -> tuple[str, float | None]:
    """ "a.txt::0.3" -> ("a.txt", 0.3); without a weight, (spec, None)."""
    name, mark, weight = spec.rpartition("::")
    if not mark:
        return spec, None
    try:
        value = float(weight)
    except ValueError:
        value = -1.0
    if not (name and 0 < value < float("inf")):
        raise ValueError(f"a weight must be a positive number, as in INPUT::0.3; got {spec!r}")
    return name, value


def list_files(spec: str) -> list[Path]:
    """The readable files a name stands for; hidden ones and unknown endings are left out of folders."""
    path = Path(spec)
    if not path.exists():
        raise ValueError(f"no such file or folder: {spec}")
    if not path.is_dir():
        if file_kind(path) is None:
            raise ValueError(f"cannot read {spec}: its ending is not one of {SUPPORTED}")
        return [path]
    inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    # By parts, not by string: the order must not depend on how "/" compares with other characters.
    files = sorted((p for p in inside if p.is_file() and file_kind(p)), key=lambda p: p.relative_to(path).parts)
    if not files:
        raise ValueError(f"no text in {spec}: no file in it ends in one of {SUPPORTED}")
    return files


def suggested_chunk_bytes(files: Sequence[Path]) -> tuple[int, str | None]:
    """CHUNK_BYTES, or less (with a note) where only a few documents of plain text would come out."""
    sizes = [estimated_bytes(p) for p in files]
    documents = sum(-(-size // CHUNK_BYTES) for size in sizes)
    if documents >= FEW_DOCUMENTS or not all(file_kind(p) == TEXT for p in files):
        return CHUNK_BYTES, None
    chunk = max(SMALLEST_CHUNK_BYTES, sum(sizes) // MANY_DOCUMENTS)
    if max(sizes, default=0) <= chunk:
        return CHUNK_BYTES, None
    return chunk, f"little text: files are cut into documents of about {chunk} bytes (chunk_bytes)"


def file_source(name: str, files: Sequence[Path], field: str, chunk_bytes: int, notes: list[str]) -> Source:
    """The documents of some files, one file after the other."""
    return Source(
        name,
        lambda: chain.from_iterable(file_documents(path, field, chunk_bytes) for path in files),
        sum(estimated_bytes(path) for path in files),
        notes,
    )


def hub_source(spec: str, field: str) -> Source:
    """A data set streamed by the `datasets` package; nothing is fetched before the first document is asked for."""
    path, _, query = spec.removeprefix(HUB).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [key for key in options if key not in HUB_KEYS]
    if unknown or not path:
        wrong = f"unknown key {unknown[0]!r}" if unknown else "no name"
        raise ValueError(f"{wrong} in {spec}; write hub:OWNER/NAME?{'&'.join(f'{k}=...' for k in HUB_KEYS)}")
    limit = options.pop("documents", None)
    if limit is not None and not (limit.isdecimal() and int(limit) > 0):
        raise ValueError(f"documents must be a positive whole number in {spec}, got {limit!r}")
    field = options.pop("field", field)
    return Source(spec, partial(hub_documents, spec, path, field, options, int(limit) if limit else None))


def hub_documents(spec: str, path: str, field: str, options: dict[str, str], limit: int | None) -> Iterator[Document]:
    """One pass over a streamed data set; `limit` counts its records."""
    datasets = require("datasets", "data", f"streaming {spec}")
    # Whatever fails in there (network, names, file formats) has dozens of types; the user needs one line.
    try:
        stream = iter(datasets.load_dataset(path, **{"split": "train", **options}, streaming=True))
    except Exception as error:
        raise ValueError(f"cannot open {spec}: {type(error).__name__}: {_first_line(error)}") from error
    for number in range(1, limit + 1) if limit else count(1):
        try:
            record = next(stream, None)
        except Exception as error:
            raise ValueError(f"reading {spec} failed at record {number}: {_first_line(error)}") from error
        if record is None:
            return
        document = field_text(record, field, f"{spec}, record {number}")
        if document.strip():
            yield document


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def concatenate(sources: Sequence[Source]) -> Source:
    """One source after the other."""
    if len(sources) == 1:
        return sources[0]
    sizes = [s.text_bytes for s in sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    return Source(" + ".join(s.name for s in sources), lambda: chain.from_iterable(sources), total)


def mix(weighted: Sequence[tuple[Source, float]]) -> Source:
    """Interleaves documents so that the bytes follow the weights; ends when the first source has no document left.

    Before every document the source that is furthest behind its share is asked, so at any point each source is
    within a few documents of its share, and every pass gives the same order.
    """
    total = sum(weight for _, weight in weighted)
    shares = [weight / total for _, weight in weighted]
    sources = [source for source, _ in weighted]
    sizes = [s.text_bytes / share for s, share in zip(sources, shares, strict=True) if s.text_bytes is not None]
    name = " + ".join(f"{s.name}::{share:.4g}" for s, share in zip(sources, shares, strict=True))
    estimate = int(min(sizes)) if len(sizes) == len(sources) else None
    notes: list[str] = []
    return Source(name, lambda: _mixed(sources, shares, notes), estimate, notes)


def _mixed(sources: Sequence[Source], shares: Sequence[float], notes: list[str]) -> Iterator[Document]:
    streams, taken = [iter(source) for source in sources], [0] * len(sources)
    while True:
        total = sum(taken)
        behind = max(range(len(sources)), key=lambda i: (shares[i] * total - taken[i], -i))
        document = next(streams[behind], None)
        if document is None:
            note = f"the mixture ended with {sources[behind].name}, the first input to run out"
            if note not in notes:
                notes.append(note)
            return
        taken[behind] += len(document.encode("utf-8"))
        yield document
