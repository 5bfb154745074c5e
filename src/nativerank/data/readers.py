"""Documents out of one file, never holding more than one piece of it in memory.

    .txt                one document up to chunk_bytes; a longer file is cut at blank lines, no byte lost
    .jsonl .json        one JSON object a line, one document each (a named field)
    .parquet            one document a row (a named column), read by record batches

The first two may be compressed (.gz, .zst). Whatever is wrong with a file raises ValueError with its name and place.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nativerank.extras import require

Document = str

TEXT, RECORDS, PARQUET = "text", "records", "parquet"
KINDS = {".txt": TEXT, ".jsonl": RECORDS, ".json": RECORDS, ".parquet": PARQUET}
COMPRESSED = (".gz", ".zst")
SUPPORTED = ".txt, .jsonl and .json (also .gz, .zst), .parquet"
# Measured on English text: what a file of the kind holds per byte on disk. For progress and sampling only.
EXPANSION = 3
BLOCK_BYTES = 1 << 18
PARQUET_ROWS = 64


def file_kind(path: Path) -> str | None:
    """How to read a file, by its name; None for an unknown ending."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    kind = KINDS.get(inner.suffix.lower())
    return None if kind == PARQUET and inner is not path else kind


def estimated_bytes(path: Path) -> int:
    """About how many bytes of text a file holds: its size, times EXPANSION where it is compressed."""
    size = path.stat().st_size
    return size if path.suffix.lower() in KINDS and file_kind(path) != PARQUET else size * EXPANSION


def file_documents(path: Path, field: str, chunk_bytes: int) -> Iterator[Document]:
    """The documents of one file, in order."""
    kind = file_kind(path)
    if kind == TEXT:
        return text_documents(path, chunk_bytes)
    if kind == RECORDS:
        return record_documents(path, field)
    if kind == PARQUET:
        return parquet_documents(path, field)
    raise ValueError(f"cannot read {path}: its ending is not one of {SUPPORTED}")


def text_documents(path: Path, chunk_bytes: int) -> Iterator[Document]:
    """Pieces of about chunk_bytes whose concatenation is the file; a file of white space only gives none."""
    buffer, offset = b"", 0
    with open_stream(path) as stream:
        while True:
            buffer += stream.read(chunk_bytes + 1 - len(buffer))
            if len(buffer) <= chunk_bytes:  # the end of the file
                break
            cut = cut_point(buffer, chunk_bytes)
            yield decode(buffer[:cut], path, offset)
            buffer, offset = buffer[cut:], offset + cut
    text = decode(buffer, path, offset)
    if text.strip() or (offset and text):
        yield text


def cut_point(buffer: bytes, limit: int) -> int:
    """Where to cut a buffer longer than `limit`: after the last blank line of (limit/2, limit], else after the last
    newline there, else at `limit`, moved back to the start of a UTF-8 character."""
    for marks in ((b"\n\n", b"\r\n\r\n"), (b"\n",)):
        found = [buffer.rfind(mark, limit // 2, limit) + len(mark) for mark in marks if mark in buffer]
        if max(found, default=0) > limit // 2:
            return max(found)
    cut = limit
    while cut > limit - 3 and buffer[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def record_documents(path: Path, field: str) -> Iterator[Document]:
    """The text field of every JSON line; blank lines and empty texts are skipped."""
    offset = 0
    with open_stream(path) as stream:
        for number, line in enumerate(stream, 1):
            text = decode(line, path, offset).removeprefix("\ufeff" if number == 1 else "").strip()
            offset += len(line)
            if text:
                document = field_text(_parsed(text, path, number), field, f"{path}, line {number}")
                if document.strip():
                    yield document


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        hint = " (a JSON array over many lines? one object per line is needed)" if line[0] in "[{" else ""
        raise ValueError(f"{path}, line {number}: not valid JSON: {error}{hint}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: a JSON object per line is needed, got {type(record).__name__}")
    return record


def field_text(record: dict[str, Any], field: str, place: str) -> Document:
    """The text of one record; None counts as empty."""
    if field not in record:
        raise ValueError(f"{place}: no field {field!r}; the record has {', '.join(map(repr, record)) or 'no fields'}")
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {field!r} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud800"
        raise ValueError(f"{place}: field {field!r} holds {value[error.start]!r}, which is not Unicode text") from None
    return value


def parquet_documents(path: Path, field: str) -> Iterator[Document]:
    """The text column of a parquet file, a few rows at a time."""
    parquet = require("pyarrow.parquet", "data", "reading .parquet")
    # pre_buffer would keep all row groups that were read; even so memory holds one row group of the column.
    with naming(path), parquet.ParquetFile(path, pre_buffer=False) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise ValueError(f"{path}: no column {field!r}; the file has {', '.join(map(repr, names)) or 'no columns'}")
        batches = (
            batch
            for group in range(file.num_row_groups)
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field])
        )
        values = (value for batch in batches for value in batch.column(0).to_pylist())
        for row, value in enumerate(values, 1):
            document = field_text({field: value}, field, f"{path}, row {row}")
            if document.strip():
                yield document


def decode(data: bytes, path: Path, offset: int) -> str:
    """Strict UTF-8; `offset` is where `data` starts in the (unpacked) file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ValueError(f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {at}") from None


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked on the way."""
    with naming(path), open(path, "rb") as raw:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield io.BufferedReader(unpacked, BLOCK_BYTES)
        elif path.suffix.lower() == ".zst":
            yield io.BufferedReader(ZstdReader(raw), BLOCK_BYTES)
        else:
            yield raw


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what the decompressors and pyarrow raise on damaged input into one line with the file's name."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("pyarrow", "zstandard"):
            raise ValueError(f"{path} is damaged: {error}") from None
        raise


class ZstdReader(io.RawIOBase):
    """Unpacks zstd frames one after the other. The package's own stream reader ends silently on a truncated file."""

    def __init__(self, raw: BinaryIO):
        self.decompressor = require("zstandard", "data", "reading .zst").ZstdDecompressor()
        self.raw, self.pending = raw, b""
        self.frame: Any = None  # the decompressor of the frame that is under way

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        while not self.pending and self._fill():
            pass
        count = min(len(target), len(self.pending))
        target[:count], self.pending = self.pending[:count], self.pending[count:]
        return count

    def _fill(self) -> bool:
        """Unpacks one more block into `pending`; False at the end of the file."""
        if self.frame is not None and self.frame.eof:
            block, self.frame = self.frame.unused_data, None
        else:
            block = b""
        block = block or self.raw.read(BLOCK_BYTES)
        if not block:
            if self.frame is not None:
                raise EOFError("compressed file ended before the end of its last frame")
            return False
        if self.frame is None:
            self.frame = self.decompressor.decompressobj()
        self.pending = self.frame.decompress(block)
        return True
