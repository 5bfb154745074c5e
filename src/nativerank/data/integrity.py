"""Hashes of files, and the memory of which files were found good.

Hashing a large data set takes longer than starting a run, so a file that was hashed once is believed as long as its
size and modification time stay. The records live in the user cache, one small JSON file per data folder.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nativerank.files import sha256_file


def cache_dir() -> Path:
    """$NATIVERANK_CACHE, else $XDG_CACHE_HOME/nativerank, else ~/.cache/nativerank."""
    if own := os.environ.get("NATIVERANK_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nativerank"


def damaged(
    folder: Path,
    expected: Mapping[str, tuple[int, str]],
    fresh: bool = False,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:
    """Checks files against (size, sha256) and says what is wrong with which, an empty list if nothing is.

    Sizes are compared always, hashes where no record vouches for the file or `fresh` asks for it. `advance` is told the
    bytes of each file that is done.
    """
    known = {} if fresh else _read_records(folder)
    good, problems = {}, []
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
            continue
        stat = path.stat()
        record = [stat.st_size, stat.st_mtime_ns, sha256]
        if stat.st_size != size:
            problems.append(f"{path} is truncated or altered: {stat.st_size} bytes, {size} expected")
        elif known.get(name) != record and sha256_file(path) != sha256:
            problems.append(f"{path} is damaged: its sha256 is not the one in the manifest")
        else:
            good[name] = record
        advance(size)
    if good != known:
        _write_records(folder, good)
    return problems


def _records_path(folder: Path) -> Path:
    key = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_dir() / "verified" / f"{key}.json"


def _read_records(folder: Path) -> dict[str, Any]:
    try:
        records = json.loads(_records_path(folder).read_bytes())
    except (OSError, ValueError):  # no records, or not readable: hash again
        return {}
    return records if isinstance(records, dict) else {}


def _write_records(folder: Path, records: Mapping[str, Any]) -> None:
    """Best effort: without a writable cache the next start hashes again."""
    path = _records_path(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may start at once: each writes its own file, the last rename wins with equal content.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(records, file)
        os.replace(temporary, path)
    except OSError:
        return
