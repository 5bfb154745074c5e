"""SIGINT and SIGTERM end a run after the step they came in, with everything saved; a second one acts at once.

Of many processes it is enough that one gets the signal: each has a vote in what they exchange anyway (`Stopping`), so
all end after the same step.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nativerank.distributed.agree import totals
from nativerank.distributed.grid import SINGLE, Grid

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal ended the run after a saved step."""

    def __init__(self, signum: int, step: int, out: Path):
        super().__init__(f"stopped after step {step}")
        self.signum, self.step, self.out = signum, step, out


@contextmanager
def catch_signals() -> Iterator[Callable[[], int | None]]:
    """While inside, SIGINT and SIGTERM are remembered instead of obeyed; a second one acts at once."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def remember(signum: int, frame: Any) -> None:
        caught.append(signum)
        # torchrun passes on what a scheduler has sent to its workers too, and kills them when its patience is over.
        for number, handler in () if "RANK" in os.environ else previous.items():
            signal.signal(number, handler)

    try:
        for wanted in SIGNALS:
            previous[wanted] = signal.signal(wanted, remember)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        previous.clear()
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Stopping:
    """The signal that came to one of the processes, as all of them know it; called, it says which, or None.

    Args:
        own: the signal that came to this process, from `catch_signals`.
        grid: of all of them.
    """

    def __init__(self, own: Callable[[], int | None], grid: Grid = SINGLE):
        self.own, self.grid = own, grid
        self.known: int | None = None

    def __call__(self) -> int | None:
        return self.own() if self.grid.world == 1 else self.known

    def votes(self) -> list[float]:
        """What this process has to say, to be summed over all."""
        return [float(self.own() == number) for number in SIGNALS]

    def hear(self, sums: Sequence[float]) -> None:
        """Takes up the summed votes; nothing where there were none."""
        self.known = self.known or next((n for n, count in zip(SIGNALS, sums, strict=False) if count), None)

    def ask(self) -> None:
        """An exchange of votes outside of a training step; called by all processes."""
        if self.grid.world > 1:
            self.hear(totals(self.votes(), self.grid, torch.device("cpu")))
