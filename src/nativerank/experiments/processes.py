"""The processes of a grid: one per run, all of which end together when the grid is stopped.

A run on one process is forked from a warm one where that can be (`experiments.warm`), anything else is started fresh.
Warm processes serve every grid of a program, as a search calls many small ones.
"""

import atexit
import os
import signal
import subprocess
import sys
import threading

from nativerank.experiments.warm import AVAILABLE, Gone, Warm

ERROR = "nativerank: error: "
FRESH = [sys.executable, "-m", "nativerank"]


class Idle:
    """Warm processes between two runs."""

    def __init__(self) -> None:
        self.lock, self.kept = threading.Lock(), list[tuple[dict[str, str], Warm]]()

    def take(self, environment: dict[str, str]) -> Warm:
        """One of this environment, or a new one; those of another are not wanted any more."""
        with self.lock:
            fitting = [entry for entry in self.kept if entry[0] == environment]
            others = [entry for entry in self.kept if entry[0] != environment]
            self.kept = fitting[1:]
        for _, warm in others:
            warm.close()
        return fitting[0][1] if fitting else Warm(environment)

    def give(self, environment: dict[str, str], warm: Warm) -> None:
        """Keeps one for later."""
        with self.lock:
            self.kept.append((environment, warm))

    def close(self) -> None:
        """Ends all."""
        with self.lock:
            kept, self.kept = self.kept, []
        for _, warm in kept:
            warm.close()


IDLE = Idle()
atexit.register(IDLE.close)


class Children:
    """Runs of a grid."""

    def __init__(self) -> None:
        self.lock, self.running, self.stopped = threading.Lock(), set[int](), False

    def run(self, command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command; none is started any more after `stop`."""
        if AVAILABLE and command[: len(FRESH)] == FRESH and not self.stopped:
            warm = IDLE.take(environment)
            try:
                found = self.forked(warm, command[len(FRESH) :])
            except Gone:
                warm.close()
            else:
                IDLE.give(environment, warm)
                return found
        return self.fresh(command, environment)

    def forked(self, warm: Warm, argv: list[str]) -> tuple[int, str, str]:
        """A run of a warm process; raises Gone if that died."""
        pids: list[int] = []

        def began(pid: int) -> None:
            pids.append(pid)
            with self.lock:
                self.running.add(pid)
                if self.stopped:
                    end(pid)

        try:
            return warm.run(argv, began)
        finally:
            with self.lock:
                self.running.difference_update(pids)

    def fresh(self, command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
        """A process of its own."""
        with self.lock:
            if self.stopped:
                return 128 + signal.SIGTERM, "", ""
            pipe = subprocess.PIPE
            # A group of its own: Ctrl-C is ours to pass on, as a second signal would end a run without saving.
            process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, process_group=0)
            self.running.add(process.pid)
        out, err = process.communicate()
        with self.lock:
            self.running.discard(process.pid)
        return process.returncode, out, err

    def stop(self) -> None:
        """Asks all to end: a run finishes its step, saves, and can be resumed."""
        with self.lock:
            self.stopped = True
            for pid in self.running:
                end(pid)


def end(pid: int) -> None:
    """Asks a process to end, if it is there."""
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass


def launcher(processes: int) -> list[str]:
    """How a number of processes of nativerank is started."""
    if processes == 1:
        return FRESH
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, "-m", "nativerank"]


def last_words(err_text: str) -> str:
    """The error of a run: its last line, or of many processes, after which torchrun has its say, that of the first."""
    lines = err_text.strip().splitlines()
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    return (errors or lines or [""])[-1]
