"""SIGINT and SIGTERM end a run after the step they came in, with everything saved; a second one acts at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            previous[wanted] = signal.signal(wanted, remember)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        previous.clear()
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
