"""A grid of training runs: cells named by a hash of their configuration, so that nothing is computed twice.

    grid folder / results.jsonl     one line per finished or failed cell
                / results-*.jsonl   the same of those who run cells of the grid elsewhere: one writer per file
                / cells/HASH/       the run folder of a cell

Interrupted grids go on where they stopped: a cell with a result is skipped, one without is resumed. `jobs` cells run
side by side, each in its own process with its share of the threads (OMP_NUM_THREADS, or the cores that this process
may use). A cell that fails is recorded, tried again when the grid is called again, and does not stop the others. One
that diverges is a result: its row holds `diverged`, the reason, in place of a loss. A row also holds the commit, the
threads, and how many steps the guard refused. Ctrl-C ends the cells that run, each with its last step saved, and
starts no more. A cell with `parallel.replicas` or `parallel.shards` runs on as many processes, started by torchrun on
this machine, which share its threads.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nativerank.experiments.cell_log import refused_steps
from nativerank.experiments.processes import Children, last_words, launcher
from nativerank.experiments.results import OTHERS, RESULTS, append, finished, outcome
from nativerank.train.guard import Diverged
from nativerank.train.setup import versions

KEPT = ("val_loss", "bits_per_byte", "step", "tokens", "seconds", "peak_memory_bytes")  # of a run's summary


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

    def __hash__(self) -> int:
        return hash(self.name)  # settings may hold lists

    @property
    def processes(self) -> int:
        """How many train it together."""
        values = dict(self.settings)
        return math.prod(values.get(f"parallel.{key}") or 1 for key in ("replicas", "shards"))

    def flags(self) -> list[str]:
        """The settings as command line flags."""
        return [part for key, value in self.settings for part in (f"--{key}", "null" if value is None else str(value))]


def run_grid(
    cells: Iterable[Cell],
    folder: Path,
    jobs: int = 1,
    say: Callable[[str], None] = print,
    about: Callable[[Cell], dict[str, Any]] = lambda cell: {},
    name: Callable[[Cell], str] | None = None,
    minutes: float | None = None,
    results: str = RESULTS,
) -> list[dict[str, Any]]:
    """Runs what has no result yet; returns the rows of all cells, failures included, in the order given.

    With `minutes` cells that did not end in time have no row: they are saved, and go on when the grid is called again.

    Args:
        cells: duplicates run once.
        folder: holds results and run folders.
        jobs: processes at once; the threads are divided among them.
        say: told about every cell that ends.
        about: what else a cell's row shall hold.
        name: what a cell is called where it is told about; None names the keys in which the cells differ.
        minutes: after which no cell is started, and those that run are stopped, each with its last step saved.
        results: the file that rows are added to, RESULTS or one like OTHERS that no other process writes.
    """
    assert results == RESULTS or fnmatch(results, OTHERS), results
    cells = list(dict.fromkeys(cells))
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: row for name, row in finished(folder).items() if name in {cell.name for cell in cells}}
    todo = [cell for cell in cells if cell.name not in rows]
    known, began, shown = len(rows), time.monotonic(), varying(cells)
    name = name or (lambda cell: " ".join(f"{key}={value}" for key, value in cell.settings if key in shown))
    todo_by_name = {cell.name: cell for cell in todo}
    with closing(_run_side_by_side(todo, folder, jobs, minutes)) as finished_now:
        for row in finished_now:
            cell = todo_by_name[row["cell"]]
            row = about(cell) | row
            append(folder / results, json.dumps(row) + "\n")
            rows[row["cell"]] = row
            left = (time.monotonic() - began) / (len(rows) - known) * (len(cells) - len(rows)) / 60
            rest = f", about {left:.0f} min left" if left >= 1 else ""
            say(f"[{len(rows)}/{len(cells)}] {name(cell)}: {outcome(row)}{rest}")
    if len(rows) < len(cells):
        say(f"stopped after {minutes:g} minutes with {len(cells) - len(rows)} to go; call it again to go on")
    return [rows[cell.name] for cell in cells if cell.name in rows]


def varying(cells: Sequence[Cell]) -> set[str]:
    """The keys in which cells differ; of a single cell all."""
    every = {key for cell in cells for key, _ in cell.settings}
    if len(cells) < 2:
        return every
    settings = [dict(cell.settings) for cell in cells]
    return {key for key in every if len({json.dumps(s.get(key)) for s in settings}) > 1}


def _run_side_by_side(cells: list[Cell], folder: Path, jobs: int, minutes: float | None) -> Generator[dict[str, Any]]:
    children, clock = Children(), None if minutes is None else 60 * minutes
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        try:
            pending = {pool.submit(_run_cell, cell, folder, jobs, children) for cell in cells}
            try:
                for future in as_completed(pending, clock):
                    pending.discard(future)
                    yield future.result()
            except TimeoutError:
                children.stop()
                yield from (row for future in pending if "stopped" not in (row := future.result()))
        except BaseException:  # Ctrl-C above all, here or in whoever takes the rows
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise


def threads_per_cell(jobs: int) -> int:
    """A cell's share of the threads that the user gives, or of the cores that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if given.isdecimal():
        threads = int(given)
    elif hasattr(os, "sched_getaffinity"):  # containers and taskset leave fewer cores than the machine has
        threads = len(os.sched_getaffinity(0))
    else:
        threads = os.cpu_count() or 1
    return max(1, threads // jobs)


def _run_cell(cell: Cell, folder: Path, jobs: int, children: Children) -> dict[str, Any]:
    out = folder / "cells" / cell.name
    threads = threads_per_cell(jobs)
    command = [*launcher(cell.processes), "train", *cell.flags(), "--out", str(out), "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // cell.processes))}
    code, out_text, err_text = children.run([*command, "--quiet", "--json"], environment)
    row: dict[str, Any] = {"cell": cell.name, "settings": dict(cell.settings)}
    row |= {"commit": versions()["commit"], "threads": threads}
    if code and children.stopped:
        return row | {"stopped": code}
    if code:
        last = last_words(err_text) or f"exit code {code}"
        if Diverged.exit_code not in (code, *map(int, re.findall(r"exitcode *: (\d+)", err_text))):
            return row | {"error": last}
        return row | {"diverged": last, "refused_steps": refused_steps(out)}
    try:
        summary = json.loads(out_text)
    except ValueError:
        return row | {"error": f"no JSON but {out_text[:80]!r}"}
    row["refused_steps"] = summary.get("refused_steps", refused_steps(out))
    if not math.isfinite(summary["val_loss"]):
        return row | {"diverged": f"the validation loss is {summary['val_loss']}"}
    return row | {key: summary[key] for key in KEPT}
