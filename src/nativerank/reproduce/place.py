"""Where and how the experiments of a scale run: one grid for all cards, a time limit, commands of ours."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nativerank.experiments.compare import Row
from nativerank.experiments.grid import Cell, run_grid
from nativerank.experiments.processes import last_words
from nativerank.experiments.request import put
from nativerank.reproduce.card import Experiments
from nativerank.reproduce.code_hash import code_hash


class OutOfTime(Exception):
    """The minutes that were given are over; what ran is saved."""


@dataclass(frozen=True)
class Place:
    """The folder of a scale and a program, and how to use it.

    Args:
        folder: holds the grid, converted models and what commands answered.
        jobs: runs side by side.
        ends: time.monotonic() at which to stop, or None.
        say: told about everything that ends.
    """

    folder: Path
    jobs: int
    ends: float | None
    say: Callable[[str], None]

    def run(self, cells: list[Cell], about: Callable[[Cell], Row], name: Callable[[Cell], str]) -> list[Row]:
        """The rows of all cells; those that are missing run now.

        Raises:
            OutOfTime: before all of them had one.
        """
        if not cells:
            return []
        rows = run_grid(cells, self.folder, self.jobs, self.say, about, name, self.minutes())
        if len(rows) < len(cells):
            raise OutOfTime
        return rows

    def minutes(self) -> float | None:
        """That are left; raises OutOfTime where none are."""
        if self.ends is None:
            return None
        left = (self.ends - time.monotonic()) / 60
        if left <= 0:
            raise OutOfTime
        return left

    def measure(self, text: str) -> dict[str, Any]:
        """What a command of ours answers in JSON; asked once per program.

        Raises:
            OutOfTime: no time is left. ValueError: it failed.
        """
        program = code_hash(Experiments(measures={"": text}))
        file = self.folder / "measures" / f"{hashlib.sha256((program + text).encode()).hexdigest()[:12]}.json"
        if not file.exists():
            self.minutes()
            self.say(f"nativerank {text}")
            file.parent.mkdir(parents=True, exist_ok=True)
            put(file, command([*text.split(), "--json"]))
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found


def command(argv: list[str]) -> str:
    """Standard output of one of our commands, in a process of its own.

    Raises:
        ValueError: it failed; with its reason.
    """
    ran = subprocess.run([sys.executable, "-m", "nativerank", *argv, "--quiet"], capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(f"nativerank {' '.join(argv)}: {last_words(ran.stderr) or f'exit code {ran.returncode}'}")
    return ran.stdout
