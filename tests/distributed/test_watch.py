"""Whoever hangs, is stopped, dies or fails is named in one line, nobody else; what is slow is let be."""

import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nativerank.distributed import watch as watch_module
from nativerank.distributed.signs import Seen, Sign, position, verdict
from nativerank.distributed.watch import EXIT_CODE, Watch, is_broken, watching
from nativerank.train.signals import catch_signals

TIMEOUT = 1.5
BEFORE = Sign(count=5, step=3, marks=6, moves=5, loose=False, where="train/step.py:9 step", host="h", pid=7)


def board(**ages):
    """Four processes at time 100; a0=(seconds since a sign, since progress, changes of the sign)."""
    found = {}
    for rank in range(4):
        heard, moved, changes = ages.get(f"r{rank}", (0, 0, {}))
        found[rank] = Seen(100.0 - heard, 100.0 - moved, replace(BEFORE, pid=rank + 1, **changes))
    return found


WAITING = (0, 30, {"waits": True})


@pytest.mark.parametrize(
    ("ages", "named"),
    [
        ({}, None),
        ({"r2": (9, 9, {})}, None),
        ({"r2": (30, 30, {})}, r"no sign of life for 30 s: rank 2 \(host h, pid 3\) in step 3 at train/step.py:9 step"),
        ({"r2": (0, 30, {})}, None),  # the others get on: no collective holds them together here
        ({"r0": WAITING, "r1": WAITING, "r3": WAITING}, None),  # rank 2 is still getting somewhere
        (
            {"r0": WAITING, "r1": WAITING, "r2": (0, 40, {}), "r3": WAITING},
            r"no progress for 30 s .*: rank 2 \(host h, pid 3\) in step 3 at .*; ranks 0, 1, 3 wait in step 3 at .*",
        ),
        (
            {f"r{i}": (0, 30, {"marks": 6 - (i == 1)}) for i in range(4)},
            r"no progress .*: rank 1 \(host h, pid 2\) in step 3 .*; ranks 0, 2, 3 in step 3 .*",
        ),
        (
            {f"r{i}": (0, 30, {"where": "data/loader.py:1 next"} if i == 3 else {}) for i in range(4)},
            r"no progress .*: rank 3 \(host h, pid 4\) in step 3 at data/loader.py:1 next; ranks 0, 1, 2 .*",
        ),
        (
            {f"r{i}": (0, 30, {"where": f"data/loader.py:{i // 2} next"}) for i in range(4)},  # two and two
            r"no progress .*\): ranks 0, 1 in step 3 at data/loader.py:0 next; ranks 2, 3 in step 3 at .*:1 next",
        ),
        (
            {f"r{i}": WAITING for i in range(4)} | {"r3": (0, 30, {"waits": True, "where": "optim/x.py:1 step"})},
            r"no progress .*\): rank 3 \(.*\) waits in step 3 at optim/x.py:1 step; ranks 0, 1, 2 wait in step 3 .*",
        ),
        ({f"r{i}": WAITING for i in range(4)}, r"no progress .*\): ranks 0, 1, 2, 3 wait in step 3 .*"),
        ({"r1": (11, 11, {"left": "MemoryError: no"}), "r2": (10.5, 10, {"left": "RuntimeError: gloo"})},
         r"rank 1 has left in step 3: MemoryError: no"),
        ({"r1": (2, 2, {"left": "MemoryError: no"})}, None),  # time for the others to notice
        ({"r1": (99, 99, {"left": ""}), "r3": (99, 99, {"left": ""})}, None),  # done before the others
        ({f"r{i}": (99, 99, {"left": ""}) for i in range(4)}, None),
    ],
)  # fmt: skip
def test_what_is_concluded_from_signs(ages, named):
    found = verdict(board(**ages), 100.0, 20.0)
    assert found is None if named is None else re.fullmatch(named, found), found


def test_what_counts_as_progress():
    seen = Seen(0.0, 0.0, BEFORE)
    seen.take(BEFORE, 1.0)  # the one it knows
    assert (seen.heard, seen.moved) == (0.0, 0.0)
    seen.take(replace(BEFORE, count=6, moves=6), 2.0)  # inside a step a moving stack is none
    assert (seen.heard, seen.moved) == (2.0, 0.0)
    seen.take(replace(BEFORE, count=7, moves=7, loose=True), 3.0)
    assert (seen.heard, seen.moved) == (3.0, 3.0)
    seen.take(replace(BEFORE, count=8, moves=7, loose=True), 4.0)  # the same place as before
    assert (seen.heard, seen.moved) == (4.0, 3.0)
    seen.take(replace(BEFORE, count=9, moves=7, marks=7), 5.0)
    assert seen.moved == 5.0


def test_only_the_first_step_of_a_process_is_loose():
    watch = Watch()
    with watch.in_step(7):
        assert (watch.step, watch.loose) == (7, True)
    marks = watch.marks
    with watch.in_step(8):
        assert not watch.loose
        watch.mark()
    assert watch.loose and watch.marks == marks + 3


def test_a_position_is_the_innermost_line_of_the_root():
    frame = sys._getframe()
    here = __file__.rpartition("/")[0] + "/"
    stack, where, waits = position(frame, here)
    assert re.fullmatch(r"test_watch.py:\d+ test_a_position_is_the_innermost_line_of_the_root", where) and not waits
    assert position(frame, "/nowhere/")[1] == "" and position(None, here) == (hash(()), "", False)
    assert position(frame, here)[0] != stack  # another line, another number


def frames(*files):
    """A stack as `position` sees it, innermost first."""
    frame = None
    for line, file in reversed(list(enumerate(files, 1))):
        code = SimpleNamespace(co_filename=file, co_name="f")
        frame = SimpleNamespace(f_code=code, f_lasti=line, f_lineno=line, f_back=frame)
    return frame


@pytest.mark.parametrize(
    ("files", "where", "waits"),
    [
        (("/t/torch/distributed/c10d.py", "/n/optim/rows.py", "/n/train/loop.py"), "optim/rows.py:2 f", True),
        (("/n/distributed/agree.py", "/n/distributed/gradients.py"), "distributed/agree.py:1 f", True),  # .tolist()
        (("/t/torch/_tensor.py", "/n/distributed/collectives.py"), "distributed/collectives.py:2 f", True),
        (("/n/data/loader.py", "/n/distributed/agree.py", "/n/train/loop.py"), "data/loader.py:1 f", False),
        (("/t/torch/_tensor.py", "/n/optim/rows.py", "/t/torch/distributed/c10d.py"), "optim/rows.py:2 f", False),
    ],
)
def test_what_counts_as_waiting(files, where, waits):
    assert position(frames(*files), "/n/")[1:] == (where, waits)


def test_one_process_watches_nobody():
    with watching(0.01) as watch, watch.in_step(1):
        time.sleep(0.1)
    assert watch.step == 1


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (RuntimeError("[/third_party/gloo/tcp/pair.cc:537] Read error: Connection reset by peer"), True),
        (dist.DistNetworkError("recv, got 0 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("connection"), False),
    ],
)
def test_which_errors_are_looked_into(error, broken):
    assert is_broken(error) is broken


# -- real processes ------------------------------------------------------------------------------------------------


PIDS = multiprocessing.get_context("fork").Array("i", 4)


def worker(rank, world, store, folder, timeout, act):
    """Six steps with a collective each; writes what it printed and exits as a command would."""
    sys.stderr = sys.stdout = open(folder / f"rank-{rank}", "w", buffering=1)
    torch.set_num_threads(1)
    PIDS[rank] = os.getpid()
    client = dist.TCPStore("localhost", store, is_master=False)
    dist.init_process_group("gloo", store=client, rank=rank, world_size=world)
    with watching(timeout) as watch, catch_signals():
        for step in range(1, 7):
            with watch.in_step(step):
                watch.mark()
                if step == 4:
                    act.in_step(rank)
                dist.all_reduce(torch.ones(10))
        act.after(rank)
        dist.all_reduce(torch.ones(10))
    dist.destroy_process_group()


def serve(pipe):
    """The store, in a process of its own: its threads hold locks at times, which workers must not inherit by a fork."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipe.send(server.port)
    time.sleep(600)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(On(...), world=4, timeout=TIMEOUT): (exit codes, everything printed); what still runs is killed."""

    def go(act, world=4, timeout=TIMEOUT):
        context = multiprocessing.get_context("fork")
        pipe, theirs = context.Pipe()
        server = context.Process(
            target=serve, args=(theirs,), daemon=True
        )  # as under torchrun, it outlives the workers
        server.start()
        args = [(rank, world, port, tmp_path, timeout, act) for port in [pipe.recv()] for rank in range(world)]
        workers = [context.Process(target=worker, args=a) for a in args]
        for process in workers:
            process.start()
        # The one that is lost last: if it cannot hear that the run is over, it is killed.
        for process in sorted(workers, key=lambda process: process is workers[act.rank]):
            process.join(2.0 if process is workers[act.rank] else 4 * TIMEOUT + 10)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        server.kill()
        server.join()
        printed = "".join((tmp_path / f"rank-{rank}").read_text() for rank in range(world))
        return [process.exitcode for process in workers], printed

    return go


class On:
    """Does something on one rank, in its fourth step or after its last."""

    def __init__(self, rank, in_step=None, after=None):
        self.rank, self.doing, self.then = rank, in_step, after

    def in_step(self, rank):
        if self.doing and rank == self.rank:
            self.doing()

    def after(self, rank):
        if self.then and rank == self.rank:
            self.then()


def errors(printed):
    return [line for line in printed.splitlines() if line.startswith("nativerank: error: ")]


def fail():
    raise MemoryError("no memory for this")


def spin():
    while True:
        pass


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSTOP), -signal.SIGKILL, r"no sign of life for [12] s: rank 2 \(.*"),
        (lambda: time.sleep(60), EXIT_CODE, r"no progress for [12] s .*: rank 2 \(.*\) in step 4; ranks 0, 1, 3 .*"),
        (spin, EXIT_CODE, r"no progress for [12] s .*: rank 2 \(.*\) in step 4; ranks 0, 1, 3 .*"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL, r"rank 2 has left in step 4 \(.*\): killed.*"),
        (fail, 1, r"rank 2 has left in step 4: MemoryError: no memory for this"),
    ],
    ids=["stopped", "sleeps", "spins", "killed", "fails"],
)
def test_one_process_that_is_lost_ends_all_with_one_line(run, what, code, line):
    codes, printed = run(On(2, what), timeout=60 if code == 1 else TIMEOUT)
    assert codes == [EXIT_CODE, EXIT_CODE, code, EXIT_CODE], printed
    (found,) = errors(printed)
    assert re.fullmatch(line, found.removeprefix("nativerank: error: ")), found
    assert printed.count("Traceback") == (code == 1)  # its own, which says where it failed


def test_the_first_process_is_watched_too(run):
    codes, printed = run(On(0, lambda: os.kill(os.getpid(), signal.SIGSTOP)), world=2)
    assert codes == [-signal.SIGKILL, EXIT_CODE]
    assert re.fullmatch(r"nativerank: error: no sign of life for [12] s: rank 0 \(.*", *errors(printed))


def stop_while_others_are_told_to_end():
    for process in PIDS:
        if process not in (0, os.getpid()):
            os.kill(process, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGSTOP)


def test_after_a_signal_nobody_waits_long_for_one_that_is_lost(run, monkeypatch):
    """Their main threads are in a collective, where Python does not get to handle the signal."""
    monkeypatch.setattr(watch_module, "SIGNALLED_SECONDS", 1.5)
    codes, printed = run(On(2, stop_while_others_are_told_to_end), timeout=10)
    assert codes == [EXIT_CODE, EXIT_CODE, -signal.SIGKILL, EXIT_CODE]
    assert re.fullmatch(r"nativerank: error: no sign of life for [123] s: rank 2 \(.*", *errors(printed))


def tell_all_to_end():
    for process in PIDS:
        os.kill(process or os.getpid(), signal.SIGTERM)
    time.sleep(3)


def test_after_a_signal_all_finish_what_they_do(run, monkeypatch):
    monkeypatch.setattr(watch_module, "SIGNALLED_SECONDS", 1.5)
    codes, printed = run(On(2, tell_all_to_end), timeout=10)
    assert (codes, errors(printed)) == ([0] * 4, [])


def busy():
    """Longer than the timeout, but getting somewhere."""
    deadline = time.monotonic() + 2 * TIMEOUT
    while time.monotonic() < deadline:
        time.sleep(0.01)
        torch.randn(200, 200) @ torch.randn(200, 200)
        time.sleep(0.01)


def test_what_takes_long_between_steps_is_let_be(run):
    codes, printed = run(On(2, after=busy))
    assert (codes, errors(printed)) == ([0] * 4, [])
