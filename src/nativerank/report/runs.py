"""A run folder as a report sees it: rows that count, events, looks at the ranks, how it ended.

A step that was rolled back comes again, and then its last row counts; events are those of all rows, undone ones
included. What stands in a file is somebody's text until it is a number: nothing here trusts it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nativerank.train.kept_config import CONFIG
from nativerank.train.metrics import FILE, read_lines

Row = dict[str, Any]
STARTS = ("start", "resume")
FARTHEST = 2**53  # up to here a float holds every step


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: to be shown. folder: where it lies. rows: all of metrics.jsonl that can be read, in their order.
        config: text of config.yaml, or "". damaged: numbers of the lines of metrics.jsonl that are no rows.
    """

    name: str
    folder: Path
    rows: list[Row]
    config: str
    damaged: tuple[int, ...] = ()

    @cached_property
    def steps(self) -> list[Row]:
        """The row that counts of every step, in their order."""
        last: dict[int, Row] = {}
        for row in self.rows:
            if "loss" in row and (step := step_of(row)) is not None:
                last[step] = row
        return [last[step] for step in sorted(last)]

    @cached_property
    def facts(self) -> Row:
        """How it started, or went on the last time."""
        return next((row for row in reversed(self.rows) if row.get("event") in STARTS), {})

    @cached_property
    def end(self) -> Row | None:
        """The row of the end; None if the run did not come there since it last started."""
        ends = [row for row in self.rows if row.get("event") in ("end", *STARTS)]
        return ends[-1] if ends and ends[-1]["event"] == "end" else None

    @cached_property
    def events(self) -> list[Row]:
        """Rows with something that happened, but start and end."""
        return [row for row in self.rows if row.get("event") not in (None, "start", "end")]

    @cached_property
    def looks(self) -> list[Row]:
        """Rows of looks that changed ranks, which name their step."""
        found = [row for row in self.rows if row.get("event") == "ranks" and step_of(row) is not None]
        return [row for row in found if isinstance(row.get("ranks"), dict)]

    @cached_property
    def axis(self) -> np.ndarray:
        """(steps,) of the rows that count."""
        return np.array([row["step"] for row in self.steps], dtype=float)

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {}

    def column(self, key: str) -> np.ndarray:
        """(steps,) a number of every row, NaN where there is none."""
        if key not in self._columns:
            self._columns[key] = numbers(row.get(key) for row in self.steps)
        return self._columns[key]

    def has(self, key: str) -> bool:
        """Whether any row has the number."""
        return bool(np.isfinite(self.column(key)).any())

    @property
    def gaps(self) -> str:
        """What of its file is not shown, in words; "" for all of it."""
        if not self.damaged:
            return ""
        some = "1 line" if len(self.damaged) == 1 else f"{len(self.damaged):,} lines"
        return f"{self.name}: {some} of {FILE} cannot be read and stays out, first line {self.damaged[0]:,}."

    @property
    def last_step(self) -> int:
        """The step that it reached."""
        return int(self.axis[-1]) if len(self.axis) else 0

    @property
    def state(self) -> str:
        """Where it stands, in words."""
        if self.end is not None:
            return "finished"
        stopped = [row for row in self.rows if row.get("action") == "stop" or row.get("event") in STARTS]
        if stopped and stopped[-1].get("action") == "stop":
            return f"diverged at step {self.last_step:,}"
        whole = self.facts.get("steps")
        return f"at step {self.last_step:,}" + (f" of {whole:,}" if isinstance(whole, int) else "")


def read_run(folder: Path, name: str | None = None) -> Run:
    """A run folder.

    Raises:
        ValueError: it holds no metrics.
    """
    try:
        rows, damaged = read_lines(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder}: {FILE} cannot be read: {error}") from None
    rows = [row for row in rows if isinstance(row, dict)]
    if not rows:
        raise ValueError(f"{folder}: {FILE} holds no rows")
    config = folder / CONFIG
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return Run(name or folder.name or str(folder.resolve().name), folder, rows, text, tuple(damaged))


def step_of(row: Row) -> int | None:
    """The step that a row tells of; None where it names none."""
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and abs(step) < FARTHEST else None


def number(value: Any) -> float:
    """What is meant as a number; NaN for anything else ("nan" and "inf" are how a row says what JSON cannot)."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def numbers(values: Iterable[Any]) -> np.ndarray:
    """`number` of each."""
    return np.array([number(value) for value in values], dtype=float)
