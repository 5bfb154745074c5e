"""A progress line on standard error: a rich bar on a terminal, a plain line now and then in a pipe, or nothing."""

import sys
import time
from types import TracebackType

from nativerank.terminal import console

PLAIN_EVERY_SECONDS = 10.0


class ByteProgress:
    """Counts bytes of text towards an estimated total.

    Args:
        label: what is going on.
        total: estimated bytes, None when unknown.
        quiet: show nothing.
    """

    def __init__(self, label: str, total: int | None, quiet: bool):
        self.label, self.total, self.done = label, total, 0
        self.started = self.shown = time.monotonic()
        self._plain = not quiet and not sys.stderr.isatty()
        self._bar = None if quiet or self._plain else _bar()

    def __enter__(self) -> "ByteProgress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        return self

    def advance(self, num_bytes: int) -> None:
        """So many bytes more are done."""
        self.done += num_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif self._plain and time.monotonic() - self.shown > PLAIN_EVERY_SECONDS:
            self.shown = time.monotonic()
            self._print()

    def _print(self, ended: bool = False) -> None:
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        of = f" of about {self.total / 1e6:.1f}" if self.total else ""
        more = (self.total or 0) - self.done
        left = f", about {more / rate:.0f} s left" if more > 0 and rate and not ended else ""
        print(f"{self.label}: {self.done / 1e6:.1f}{of} MB, {rate / 1e6:.1f} MB/s{left}", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            if error is None:
                self._bar.update(self._task, total=self.done, completed=self.done)  # the total was an estimate
            self._bar.stop()
        elif self._plain and error is None:
            self._print(ended=True)


def _bar():
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=console(stderr=True))
