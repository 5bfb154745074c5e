"""The files that hold what became of the cells of a grid: a JSON object a line, added and never changed.

results.jsonl has one writer, who runs the grid; results-*.jsonl have one each, who runs some of its cells elsewhere.
"""

import json
import os
from pathlib import Path
from typing import Any

RESULTS, OTHERS = "results.jsonl", "results-*.jsonl"


def result_files(folder: Path) -> list[Path]:
    """The files with results of a grid."""
    return [file for file in (folder / RESULTS, *sorted(folder.glob(OTHERS))) if file.is_file()]


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """What became of each cell by its name, failures included; a last line cut off by a crash is left out.

    A result counts more than a failure, whichever file it stands in.
    """
    rows: dict[str, dict[str, Any]] = {}
    for file in result_files(folder):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                name = row["cell"]
            except (ValueError, KeyError, TypeError):
                continue
            if "error" not in row or "error" in rows.get(name, row):
                rows[name] = row
    return rows


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Results so far, by cell name: a failed cell has none and is tried again."""
    return {name: row for name, row in outcomes(folder).items() if "error" not in row}


def outcome(row: dict[str, Any]) -> str:
    """What became of a cell, in words."""
    for key in ("error", "diverged"):
        if key in row:
            return f"{key}: {row[key]}"
    return f"val_loss {row['val_loss']:.4f}"


def append(file: Path, line: str) -> None:
    """Adds a line, on a new one where a crash left the last unfinished."""
    with file.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read(1) == b"\n" else "\n" + line
        stream.write(line.encode())
