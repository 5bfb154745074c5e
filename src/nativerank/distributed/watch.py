"""Nobody waits for ever: a process that hangs, is stopped or has died ends the run with one line that names it.

Two threads in each process, asleep but for a moment a second. One talks to the store that the process group was made
with: it says where the main thread is and, on a watcher, reads what the others say (`distributed.signs`). The other
one looks at the clock alone, so that a store that does not answer, for its host is gone, is noticed too. Rank 0 watches
all; the last rank watches too, a little more patiently, for rank 0 could be the one that hangs. Whoever finds something
tells all processes through the store; the first to do so prints one line, and all leave. The exit code is
EXIT_CODE: torchrun then starts the job again (--max-restarts) or ends it.

After SIGTERM or SIGINT (a launcher that lost one process stops the others) ten seconds without sign of a process are
enough: the main thread may wait for it on a device, where Python never gets to handle the signal.

A collective that fails because another process has died becomes one line too: `watching` waits until the signs show who
it was. What fails for another reason passes through as it is.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nativerank.distributed.signs import AWAITED, Seen, Sign, gone, lost, position, verdict

EXIT_CODE = 4
SIGNALLED_SECONDS = 10.0  # without sign of a process, after a signal to end
LEAVING_SECONDS = 5.0  # that a thread may take to end; one that a silent store holds for longer is left to itself
ROOT = Path(__file__).parents[1].as_posix() + "/"
OVER = "over"  # key of the store: the line of who ended the run
BROKEN = re.compile(r"gloo|nccl|connection|broken pipe|socket|timed? ?out", re.I)


class Watch:
    """What the main thread of a process tells: where it got. Costs an addition.

    Attributes:
        step: that it is in. marks: how often it got somewhere. loose: whether a stack that moves is progress.
    """

    def __init__(self) -> None:
        self.step, self.marks, self.loose = 0, 0, True
        self._warm = False

    def mark(self) -> None:
        """It got somewhere: a micro-batch, a batch of the validation."""
        self.marks += 1

    @contextmanager
    def in_step(self, step: int) -> Iterator[None]:
        """The block is this training step; but for the first of the process, which may compile, only marks count."""
        self.step, self.loose = step, not self._warm
        self.marks += 1
        try:
            yield
        finally:
            self.marks += 1
            self.loose, self._warm = True, True


@contextmanager
def watching(
    timeout: float,
    shared: tuple[type[BaseException], ...] = (),
    end: Callable[[str | None], None] | None = None,
) -> Iterator[Watch]:
    """Watches the processes of the default group for the block; without a group, or with one process, does nothing.

    Args:
        timeout: seconds without sign or progress after which the run is ended; 0 never ends it.
        shared: what all processes raise together, so that nobody is missing after it.
        end: ends this process; the line to print, or None to leave without a word. For tests.

    Raises:
        SystemExit: a collective failed because another process has left; the line was printed.
    """
    watch = Watch()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield watch
        return
    signs = Signs(watch, timeout, end or leave)
    signs.start()
    try:
        yield watch
    except BaseException as error:
        if is_broken(error):
            signs.explain()
        why = "" if isinstance(error, shared) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        signs.stop(why[:200])
        raise
    else:
        signs.stop("")


def is_broken(error: BaseException) -> bool:
    """Whether an exception may be a collective that lost another process."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and BROKEN.search(str(error)) is not None


def leave(line: str | None) -> None:
    """Ends this process from any thread; the main one may never come back from where it is."""
    if line is not None:
        print(f"nativerank: error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


def fresh_stores() -> tuple[dist.Store, dist.Store]:
    """Two connections to the store of the default group, below a name that no earlier start of the job has used."""
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name)
    store: Any = dist.distributed_c10d._get_default_store()
    one, two = (dist.PrefixStore(f"nativerank/watch/{name[0]}", store.clone()) for _ in range(2))
    return one, two


class Bell:
    """Tells that SIGTERM or SIGINT came, even while the main thread never gets to its handler.

    The operating system's part of Python's handler writes the number of the signal into a pipe at once.
    """

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        for end in (self.reading, self.writing):
            os.set_blocking(end, False)
        self.before: int | None = None
        with suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
            self.before = signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)

    def rang(self) -> bool:
        """Whether one came since the last time."""
        try:
            return bool({signal.SIGTERM, signal.SIGINT} & set(os.read(self.reading, 4096)))
        except OSError:
            return False

    def give_back(self) -> None:
        """From now on signals do not ring here."""
        if self.before is not None:
            signal.set_wakeup_fd(self.before)
            self.before = None

    def close(self) -> None:
        """Done by who reads, after `give_back`."""
        os.close(self.reading)
        os.close(self.writing)


class Signs:
    """The two threads of a process."""

    def __init__(self, watch: Watch, timeout: float, end: Callable[[str | None], None]) -> None:
        self.watch, self.timeout, self.end = watch, timeout, end
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.interval = min(max(timeout / 20, 0.05), 1.0) if timeout else 1.0
        self.main = threading.get_ident()
        self.store, self.reading = fresh_stores()  # of the talking and of the main thread
        self.host, self.pid = socket.gethostname(), os.getpid()
        self.count = self.moves = self.stack = 0
        self.stopped, self.ending, self.signalled = threading.Event(), threading.Event(), threading.Event()
        self.bell = Bell()
        works = (self._talk, self._look)
        self.threads = [threading.Thread(target=w, name=f"nativerank{w.__name__}", daemon=True) for w in works]
        now = time.monotonic()
        self.board = {rank: Seen(now, now) for rank in range(self.world)}
        self.answered = now  # when the store last did

    @property
    def watches(self) -> bool:
        """Whether this process reads what the others say."""
        return self.rank in (0, self.world - 1)

    def start(self) -> None:
        """Gives the first sign, waits until everybody has, and starts the threads."""
        self._say(self.store, None)
        dist.all_reduce(torch.zeros(()))
        for thread in self.threads:
            thread.start()

    def stop(self, left: str) -> None:
        """Ends the threads; the last sign says why."""
        self.bell.give_back()
        self.stopped.set()
        with suppress(RuntimeError, OSError):  # the store is gone, and with it whoever would read this
            self._say(self.reading, left)  # the other one may be stuck
        for thread in self.threads:  # one that comes back from the store while the interpreter shuts down would abort
            thread.join(LEAVING_SECONDS)

    # -- talking ----------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        """Until the end: says where this process is, hears of the others."""
        while not self.stopped.wait(self.interval):
            try:
                self._say(self.store, None)
                if self.watches or self.signalled.is_set():
                    self._hear()
                over = self.store.check([OVER])
            except (RuntimeError, OSError):
                continue  # `_look` counts the seconds
            self.answered = time.monotonic()
            if over and not self.stopped.is_set() and not self.ending.is_set():
                self.end(None)

    def _say(self, store: dist.Store, left: str | None) -> None:
        stack, where, waits = position(sys._current_frames().get((self.main, *AWAITED)[-1]), ROOT)
        self.count, self.moves, self.stack = self.count + 1, self.moves + (stack != self.stack), stack
        w = self.watch
        sign = Sign(self.count, w.step, w.marks, self.moves, w.loose, where, waits, self.host, self.pid, left)
        store.set(f"sign/{self.rank}", sign.encode())

    def _hear(self) -> None:
        here = [rank for rank, seen in self.board.items() if seen.sign.left is None]
        for rank, sign in self._last(here, self.store).items():
            self.board[rank].take(sign, time.monotonic())

    def _last(self, which: list[int], store: dist.Store) -> dict[int, Sign]:
        """The last sign of each of these processes."""
        texts = store.multi_get([f"sign/{rank}" for rank in which]) if which else []
        return {rank: Sign.decode(text) for rank, text in zip(which, texts, strict=True)}

    # -- looking at the clock ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """Until the end: judges what was heard. The watchers find out first, in order; the rest after them."""
        patience = self.timeout + {0: 0.0, self.world - 1: 5.0}.get(self.rank, 10.0) * self.interval
        before = time.monotonic()
        while not self.stopped.wait(self.interval):
            now = time.monotonic()
            if now - before > max(self.timeout / 2, 2 * self.interval):  # this process was stopped: maybe all were
                self._begin_anew(now)
            before = now
            if self.signalled.is_set():
                if line := self._lost(now):
                    self._finish(line)
            elif self.bell.rang():
                self._begin_anew(now)
                self.signalled.set()
            if not self.timeout:
                continue
            if now - self.answered >= patience:
                self._finish(self._silence(now) if self.watches else None)
            elif self.watches and (line := verdict(self.board, now, patience)):
                self._finish(line)
        self.bell.close()

    def _begin_anew(self, now: float) -> None:
        """Counts the seconds from now on."""
        self.answered = now
        self.board = {rank: Seen(now, now, seen.sign) for rank, seen in self.board.items()}

    def _silence(self, now: float) -> str:
        return f"no sign of life for {now - self.answered:.0f} s: rank 0, or the store on its host"

    def _lost(self, now: float) -> str | None:
        """After a signal: who need not be waited for."""
        if now - self.answered >= SIGNALLED_SECONDS and self.board[0].sign.left is None:
            return self._silence(now)
        return lost(self.board, now, SIGNALLED_SECONDS)

    def _finish(self, line: str | None) -> None:
        """Ends the run: one process prints its line, the others hear that it is over, and get the time to."""
        if self.stopped.is_set():
            return
        self.ending.set()
        first = [True]  # unless the store says otherwise; in a thread of its own, for it may not answer
        threading.Thread(target=lambda: first.insert(0, self._tell(self.store, line or "")), daemon=True).start()
        time.sleep(2 * self.interval + 0.2)
        self.end(line if first[0] else None)

    def _tell(self, store: dist.Store, line: str) -> bool:
        """Tells all that it is over; whether this process was the first to."""
        mine = f"{self.rank}: {line}"
        try:
            return bool(store.compare_set(OVER, "", mine).decode() == mine)
        except (RuntimeError, OSError):
            return True

    # -- after a collective failed ----------------------------------------------------------------------------

    def explain(self) -> None:
        """Finds out who is missing after a collective failed, and says so once.

        Raises:
            SystemExit: somebody is. Otherwise returns.
        """
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher that has noticed too; it is over soon
        missing, known = self._missing()
        if self.ending.is_set():  # those that are missing were told to leave, and this process is about to
            time.sleep(60)
        if not missing:
            return
        line = gone({rank: replace(sign, step=max(sign.step, self.watch.step)) for rank, sign in missing.items()})
        # With the store gone nobody can be asked who was first: the last rank speaks.
        if self._tell(self.reading, line) if known else self.rank == self.world - 1:
            print(f"nativerank: error: {line}", file=sys.stderr, flush=True)
        self.stop("")
        raise SystemExit(EXIT_CODE) from None

    def _missing(self) -> tuple[dict[int, Sign], bool]:
        """(who has left or gives no sign any more, with the last one, and True); rank 0 and False if its store is gone.

        Nobody is missing if all are there, which leaves the failed collective unexplained.
        """
        others = [rank for rank in range(self.world) if rank != self.rank]
        deadline = time.monotonic() + max(3 * self.interval, 1.0)
        first: dict[int, Sign] = {}
        try:
            while True:
                last = self._last(others, self.reading)
                first = first or last
                failed = {rank: sign for rank, sign in last.items() if sign.left}
                here = {rank: sign for rank, sign in last.items() if sign.left is None}
                silent = {rank: sign for rank, sign in here.items() if sign.count == first[rank].count}
                if failed or not silent or time.monotonic() > deadline:
                    return failed or silent, True
                time.sleep(self.interval / 2)
        except (RuntimeError, OSError):
            return {0: first.get(0, self.board[0].sign)}, False
