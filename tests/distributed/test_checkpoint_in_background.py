"""Saves in the background, on full disks and of processes that die: the same bits, or a checkpoint less."""

import errno
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sharded_checkpoints import STATE, built, fill_with, grid_of, save_on, slowly

from nativerank import files
from nativerank.distributed import signs
from nativerank.distributed.grid import SINGLE
from nativerank.train import checkpoint
from nativerank.train.saver import Saver


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1)])
def test_in_the_background_the_bits_are_the_same(forked, tmp_path, monkeypatch, grid):
    forked(save_on, grid[0] * grid[1], *grid, tmp_path / "sync", False, "spectron", 3)
    monkeypatch.setattr(checkpoint, "write_pieces", slowly(0.05))
    forked(save_on, grid[0] * grid[1], *grid, tmp_path / "async", True, "spectron", 3)
    files = sorted(p.relative_to(tmp_path / "sync") for p in (tmp_path / "sync").rglob("*") if p.is_file())
    assert len(files) == 3 * (2 * grid[0] * grid[1] + 2)
    for file in files:
        assert (tmp_path / "sync" / file).read_bytes() == (tmp_path / "async" / file).read_bytes(), file


def test_a_save_in_the_background_returns_at_once_and_keeps_its_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_pieces", slowly(0.2))
    model, optimizer = built("spectron", SINGLE)
    saver, done, state = Saver(tmp_path, background=True), [], STATE | {"guard": {"in_a_row": 0}}
    began = time.perf_counter()
    saver.save(1, checkpoint.contents(model, optimizer), state, lambda: done.append(1))
    assert time.perf_counter() - began < 0.2 and not done and checkpoint.list_checkpoints(tmp_path) == []
    state["guard"]["in_a_row"] = 5
    buffers = {key: b.data_ptr() for key, b in saver._buffers.items()}
    saver.save(2, checkpoint.contents(model, optimizer), state)
    assert done == [1] and [c.step for c in checkpoint.list_checkpoints(tmp_path)] == [1], "one at a time"
    assert checkpoint.read_state(tmp_path / "checkpoints/step-000001")["guard"] == {"in_a_row": 0}
    assert {key: b.data_ptr() for key, b in saver._buffers.items()} == buffers
    saver.close()
    assert [c.step for c in checkpoint.list_checkpoints(tmp_path)] == [1, 2]


# -- full disks and dead processes ----------------------------------------------------------------------------------


def fill_the_disk(rank, target, background, error, victim):
    """Two saves, of which the second fails on one process, and a third."""
    grid, write = grid_of(1, 2), checkpoint.write_pieces
    model, optimizer = built("spectron", grid)
    saver, said = Saver(target, grid, background), []
    for step in (1, 2, 3):
        if step == 2 and rank == victim:
            checkpoint.write_pieces = lambda pieces, file: (_ for _ in ()).throw(OSError(error, os.strerror(error)))
        try:
            saver.save(step, checkpoint.contents(model, optimizer, grid), STATE)
            saver.wait()
        except ValueError as problem:
            said.append((step, str(problem), saver.failed))
        checkpoint.write_pieces = write
    return said


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_for_one_is_an_error_for_all(forked, tmp_path, background, victim):
    found = forked(fill_the_disk, 2, tmp_path, background, errno.ENOSPC, victim)
    for ((step, line, failed),) in found:
        assert step == 2 and "disk full while writing" in line and "step-000002" in line and not failed
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000003"]
    for path in (tmp_path / "checkpoints").iterdir():
        checkpoint.check(path)


def test_a_disk_that_not_all_share_is_named(forked, tmp_path):
    for ((_, line, _),) in forked(fill_the_disk, 2, tmp_path, False, errno.ENOENT, 1):
        assert "is not on a disk that all processes share" in line


def test_whoever_waits_for_a_save_shows_where_its_thread_is(tmp_path, monkeypatch):
    """A save that is long must not look like a process that stands still."""
    seen = []

    def look(*args):
        thread = threading.get_ident()
        until = time.monotonic() + 30
        while not signs.AWAITED:
            assert time.monotonic() < until
            time.sleep(0.001)
        seen.append((list(signs.AWAITED) == [thread], threading.main_thread().ident != thread))

    monkeypatch.setattr(checkpoint, "write_pieces", look)
    saver = Saver(tmp_path, background=True)
    saver.save(1, {"model": []}, STATE)
    with pytest.raises(ValueError, match="not on a disk"):
        saver.wait()  # nothing was written
    assert seen == [(True, True)] and signs.AWAITED == []
    saver.close()


def test_an_error_in_the_background_is_known_before_the_next_save(tmp_path, monkeypatch):
    def full(pieces, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_pieces", full)
    model, optimizer = built("spectron", SINGLE)
    saver = Saver(tmp_path, background=True)
    saver.save(1, checkpoint.contents(model, optimizer), STATE)
    saver.close()
    assert saver.failed
    with pytest.raises(ValueError, match="disk full"):
        saver.wait()
    assert not saver.failed and list((tmp_path / "checkpoints").iterdir()) == []


def save_until_killed(rank, folder, background):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    grid = grid_of(1, 2)
    model, optimizer = built("spectron", grid)
    saver = Saver(folder, grid, background)
    try:
        for step in range(1, 1000):
            fill_with(model, step)
            saver.save(step, checkpoint.contents(model, optimizer, grid), STATE | {"step": step})
            fill_with(model, -1)
    except RuntimeError:
        saver.close()
        os._exit(3)  # the other one is gone


MOMENTS = {
    "the folder": ".step-000003.partial-*",
    "a file of the first": ".step-000003.partial-*/model-00000*",
    "a file of the second": ".step-000003.partial-*/optimizer-00001*",
    "the manifest": ".step-000003.partial-*/manifest.json",
    "its name": "step-000003",
}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_of_one_process_leaves_complete_checkpoints(tmp_path, monkeypatch, moment, victim):
    """Moments are far enough apart to be met."""
    sync = files.sync
    monkeypatch.setattr(files, "sync", lambda path: (time.sleep(0.01), sync(path)))
    monkeypatch.setattr(checkpoint, "write_pieces", slowly(0.01))
    context = mp.start_processes(save_until_killed, (tmp_path, True), 2, join=False, start_method="fork")
    pids, until = context.pids(), time.monotonic() + 60
    while not any((tmp_path / "checkpoints").glob(MOMENTS[moment])):
        assert time.monotonic() < until
    os.kill(pids[victim], signal.SIGKILL)
    with pytest.raises(mp.ProcessExitedException):
        context.join(timeout=60)
    assert time.monotonic() < until, "the other one hangs"
    found = checkpoint.list_checkpoints(tmp_path)
    assert [c.step for c in found[:2]] == [1, 2] and len(found) in (2, 3, 4)
    for c in found:
        checkpoint.check(c.path)
        model, optimizer = built("spectron", SINGLE)
        state = checkpoint.load(c.path, model, checkpoint.contents(model, optimizer))
        assert state["step"] == c.step and all(bool((p == c.step).all()) for p in model.parameters())
    checkpoint.save(tmp_path, 9, checkpoint.contents(model, optimizer), STATE)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")], "a later save cleans up"
