"""A grid of training runs: cells named by a hash of their configuration, so that nothing is computed twice.

    grid folder / results.jsonl     one line per finished or failed cell
                / cells/HASH/       the run folder of a cell

Interrupted grids go on where they stopped: a cell with a result is skipped, one without is resumed. `jobs` cells run
side by side, each in its own process with its share of the threads. A cell that fails is recorded and does not stop
the others.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Cell:
    """One run: dotted keys of RunConfig and their values, e.g. {"method": "spectron", "optim.lr": 0.05}."""

    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, **settings: Any) -> "Cell":
        """A cell from keywords, with __ for the dots: optim__lr=0.05."""
        return cls(tuple(sorted((key.replace("__", "."), value) for key, value in settings.items())))

    @property
    def name(self) -> str:
        """Twelve hex digits that depend on the settings alone."""
        return hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:12]

    def flags(self) -> list[str]:
        """The settings as command line flags."""
        return [part for key, value in self.settings for part in (f"--{key}", str(value))]


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Results so far, by cell name; a last line cut off by a crash is left out."""
    results: dict[str, dict[str, Any]] = {}
    file = folder / RESULTS
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "error" not in row:  # a failed cell is tried again
            results[row["cell"]] = row
    return results


def run_grid(
    cells: Iterable[Cell], folder: Path, jobs: int = 1, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Runs what has no result yet; returns the rows of all cells, failures included, in the order given.

    Args:
        cells: duplicates run once.
        folder: holds results and run folders.
        jobs: processes at once; the machine's threads are divided among them.
        say: told about every cell that ends.
    """
    cells = list(dict.fromkeys(cells))
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: row for name, row in finished(folder).items() if name in {cell.name for cell in cells}}
    todo = [cell for cell in cells if cell.name not in rows]
    for row in _run_side_by_side(todo, folder, jobs):
        _append(folder / RESULTS, json.dumps(row) + "\n")
        rows[row["cell"]] = row
        outcome = f"error: {row['error']}" if "error" in row else f"val_loss {row['val_loss']:.4f}"
        say(f"[{len(rows)}/{len(cells)}] {' '.join(f'{k}={v}' for k, v in row['settings'].items())}: {outcome}")
    return [rows[cell.name] for cell in cells]


def _append(file: Path, line: str) -> None:
    """Adds a line, on a new one where a crash left the last unfinished."""
    with file.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read(1) == b"\n" else "\n" + line
        stream.write(line.encode())


def _run_side_by_side(cells: list[Cell], folder: Path, jobs: int) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        pending = [pool.submit(_run_cell, cell, folder, jobs) for cell in cells]
        for future in as_completed(pending):
            yield future.result()


def _run_cell(cell: Cell, folder: Path, jobs: int) -> dict[str, Any]:
    out = folder / "cells" / cell.name
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    command = [sys.executable, "-m", "nativerank", "train", *cell.flags(), "--out", str(out), "--resume", "auto"]
    result = subprocess.run(
        [*command, "--quiet", "--json"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads}
    )
    row: dict[str, Any] = {"cell": cell.name, "settings": dict(cell.settings)}
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
        return row | {"error": last[0]}
    try:
        summary = json.loads(result.stdout)
    except ValueError:
        return row | {"error": f"no JSON but {result.stdout[:80]!r}"}
    return row | {k: summary[k] for k in ("val_loss", "bits_per_byte", "step", "tokens", "seconds")}
