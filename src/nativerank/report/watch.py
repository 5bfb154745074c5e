"""A run while it goes on: metrics.jsonl read as it grows, and what of it there is to look at.

`Tail` reads what was written since it last looked, so a look costs what is new and not what is there. A resumed run
puts a shorter file in the place of the old one; then all is read again. The last line may be half written, which is no
fault; a line before others that is no row is one. `Watched` folds rows into numbers along the steps: a step that comes
again after a rollback takes the place of what was undone. No torch, so that a look takes no time.
"""

import json
import math
import os
import time
from array import array
from bisect import bisect_left
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from nativerank.report.runs import STARTS, Row, number, step_of
from nativerank.train.kept_config import CONFIG
from nativerank.train.metrics import FILE

EVENTS = 50  # that are kept
RECENT = 50  # steps whose mean time says how long the rest takes
SILENT_SECONDS, SILENT_STEPS = 60.0, 20  # without a row, after which a run may be gone; steps as long as the last ones
SERIES = ("loss", "val_loss", "tokens_per_second", "lr", "grad_norm", "seconds")
LATEST = ("tokens", "mfu", "peak_memory_bytes", "optimizer_share", "guide_alpha", "distill_loss", "train_flops")


class Tail:
    """The rows of a file that grows."""

    def __init__(self, file: Path):
        self.file = file
        self._start_over()

    def _start_over(self) -> None:
        self.inode, self.offset, self.lines, self.rest = -1, 0, 0, b""
        self.doubtful = ""  # what is wrong with the last line

    def read(self) -> tuple[list[Row], bool]:
        """(new rows, whether they are those of a new file); nothing of a file that is not there yet.

        Raises:
            ValueError: a line that is not the last one is no row.
        """
        try:
            with self.file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                other = status.st_ino != self.inode or status.st_size < self.offset
                if other:
                    self._start_over()
                    self.inode = status.st_ino
                stream.seek(self.offset)
                data = stream.read()
        except FileNotFoundError:
            return [], False
        except OSError as error:
            raise ValueError(f"{self.file} cannot be read: {error.strerror}") from None
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [row for line in lines if (row := self._row(line)) is not None], other

    def _row(self, line: bytes) -> Row | None:
        if self.doubtful:
            raise ValueError(f"{self.file} is damaged: line {self.lines} {self.doubtful}")
        self.lines += 1
        try:
            row = json.loads(line)
        except ValueError:
            self.doubtful = "is no JSON"
            return None
        self.doubtful = "" if isinstance(row, dict) else "is no row"
        return row if isinstance(row, dict) else None


class Series:
    """A number along the steps."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def put(self, step: int, value: float) -> None:
        """The value at a step; later ones are forgotten."""
        if self.steps and self.steps[-1] >= step:
            kept = bisect_left(self.steps, step)
            del self.steps[kept:], self.values[kept:]
        self.steps.append(step)
        self.values.append(value)

    @property
    def last(self) -> float:
        """NaN if there is none."""
        return self.values[-1] if self.values else math.nan

    def recent(self, count: int) -> float:
        """Mean of the last finite ones; NaN without any."""
        found = [value for value in self.values[-count:] if math.isfinite(value)]
        return sum(found) / len(found) if found else math.nan

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values)."""
        return np.array(self.steps, dtype=float), np.array(self.values)


class Watched:
    """A run as far as it is written.

    Attributes:
        facts: of its last start. end: the row of the end, None before it. events: the last ones.
        series: numbers along the steps. latest: others, of the last row that has them.
        probes, probed: norms of the last look, and its step.
    """

    def __init__(self, folder: Path):
        self.folder, self.tail = folder, Tail(folder / FILE)
        self._forget()

    def _forget(self) -> None:
        self.facts: Row = {}
        self.end: Row | None = None
        self.step, self.rows, self.ended_by = 0, 0, ""
        self.events: deque[Row] = deque(maxlen=EVENTS)
        self.series = {name: Series() for name in SERIES}
        self.ratios = Series()  # the largest share of its bound that a step had
        self.latest: dict[str, float] = {}
        self.probes: dict[str, dict[str, float]] = {}
        self.probed = 0

    def update(self) -> bool:
        """Takes up what was written since; says whether that was anything.

        Raises:
            ValueError: the file is damaged.
        """
        rows, other = self.tail.read()
        if other:
            self._forget()
        for row in rows:
            self._take(row)
        self.rows += len(rows)
        return bool(rows) or other

    def _take(self, row: Row) -> None:
        event, step = row.get("event"), step_of(row)
        if event in STARTS:
            self.facts, self.end, self.ended_by = row, None, ""
        if event not in (None, "start", "end"):
            self.events.append(row)
        if event == "end":
            self.end = row
        if event == "interrupted" or row.get("action") == "stop":
            self.ended_by = str(event)
        if step is not None:
            self.step = step
            if "loss" in row:
                self._take_step(row, step)

    def _take_step(self, row: Row, step: int) -> None:
        for name, series in self.series.items():
            if name in row:
                series.put(step, number(row[name]))
        self.latest |= {name: number(row[name]) for name in LATEST if name in row}
        if isinstance(row.get("probes"), dict):
            looked = {name: values for name, values in row["probes"].items() if isinstance(values, dict)}
            self.probes = {name: {k: number(v) for k, v in values.items()} for name, values in looked.items()}
            self.probed = step
            ratios = [values["update_ratio"] for values in self.probes.values() if "update_ratio" in values]
            if ratios:
                self.ratios.put(step, max(ratios))
        back = row.get("rolled_back_to")
        if isinstance(back, int):
            self.step = back

    # -- what follows from it ---------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Of the whole run; 0 if that is not known."""
        steps = self.facts.get("steps")
        return steps if isinstance(steps, int) else 0

    @property
    def seconds_left(self) -> float:
        """That its remaining steps take if they are like the last ones; NaN if that is not known."""
        if self.end is not None:
            return 0.0
        return max(self.steps - self.step, 0) * self.series["seconds"].recent(RECENT) if self.steps else math.nan

    def silent_seconds(self) -> float:
        """Since something was written; NaN before."""
        try:
            return max(time.time() - self.tail.file.stat().st_mtime, 0.0)
        except OSError:
            return math.nan

    @property
    def state(self) -> str:
        """waiting, running, silent, interrupted, diverged or finished."""
        if self.end is not None:
            return "finished"
        if self.ended_by:
            return "interrupted" if self.ended_by == "interrupted" else "diverged"
        if not self.rows:
            return "waiting"
        patience = max(SILENT_SECONDS, SILENT_STEPS * (self.series["seconds"].recent(RECENT) or 0))
        return "silent" if self.silent_seconds() > patience else "running"

    def checkpoints(self) -> list[int]:
        """Steps of those that are complete."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("checkpoints/step-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def record(self) -> dict[str, Any]:
        """Everything for a program; null is what is not known."""
        last = {name: series.last for name, series in self.series.items()} | self.latest
        if self.end is not None:
            last |= {key: number(self.end.get(key)) for key in ("val_loss", "peak_memory_bytes")}
        return {
            "run": str(self.folder),
            "state": self.state,
            "step": self.step,
            "steps": self.steps or None,
            "seconds_left": known(self.seconds_left),
            "silent_seconds": known(self.silent_seconds()),
            **{name: self.facts.get(name) for name in ("model", "method", "device", "parameters", "tracked")},
            **{name: known(value) for name, value in last.items()},
            "probed_step": self.probed or None,
            "probes": {name: {k: known(v) for k, v in values.items()} for name, values in self.probes.items()},
            "checkpoints": self.checkpoints(),
            "events": list(self.events),
        }


def known(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def watch_run(folder: Path) -> Watched:
    """A run, with what is written so far.

    Raises:
        ValueError: no such folder, or no run in it; damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"no such run: {folder}")
    if not (folder / FILE).is_file() and not any((folder / name).exists() for name in (CONFIG, ".lock")):
        raise ValueError(f"{folder} is not a run folder: it has no {FILE}")
    watched = Watched(folder)
    watched.update()
    return watched
