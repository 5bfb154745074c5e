"""Saves checkpoints one after the other, in the background if wanted.

    at once           `save` returns when the checkpoint is there
    in the background   `save` copies this process's tensors into host buffers and returns; a thread writes them

At most one save is in flight and the buffers are used again (on CUDA pinned), so memory is bounded by one more copy of
what this process holds. The threads of all processes settle the manifest over a group of their own, which nothing else
uses; an error in one is an error in all, raised by the next `save` or `wait`.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.pieces import Piece
from nativerank.distributed.signs import waiting_for
from nativerank.distributed.start import group_timeout
from nativerank.train import checkpoint


class Saver:
    """Writes the checkpoints of one run.

    Args:
        folder: of the run.
        grid: all of its processes make one of these, and call its methods together.
        background: see above.
        timeout: seconds, as of `distributed.start`; the threads of processes wait for each other as long as these.
    """

    def __init__(self, folder: Path, grid: Grid = SINGLE, background: bool = False, timeout: float = 600.0):
        self.folder, self.grid = folder, grid
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._id = self._thread.submit(threading.get_ident).result() if self._thread else 0
        if background and grid.world > 1:
            self.grid = replace(grid, everyone=dist.new_group(timeout=group_timeout(timeout), backend="gloo"))
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._in_flight: Future[checkpoint.Checkpoint] | None = None

    @property
    def failed(self) -> bool:
        """Whether the save in flight has ended in an error, which `wait` raises; asks no other process."""
        return self._in_flight is not None and self._in_flight.done() and self._in_flight.exception() is not None

    def save(
        self, step: int, tensors: checkpoint.Contents, state: dict[str, Any], then: Callable[[], None] = lambda: None
    ) -> None:
        """As `checkpoint.save`, once the save in flight is over.

        Args:
            tensors, state: may change as soon as this returns.

        Raises:
            ValueError: the disk is full, now or in the save before.
        """
        self.wait()
        if self._thread is None:
            checkpoint.save(self.folder, step, tensors, state, self.grid, then)
        else:
            copies, state = self._copied(tensors), deepcopy(state)
            self._in_flight = self._thread.submit(checkpoint.save, self.folder, step, copies, state, self.grid, then)

    def wait(self) -> None:
        """Returns when no save is in flight.

        Raises:
            ValueError: the disk was full.
        """
        if self._in_flight is not None:
            try:
                with waiting_for(self._id):  # who writes gets on; who waits does so for the others
                    self._in_flight.result()
            finally:
                if self._in_flight.done():  # not if a signal came while waiting
                    self._in_flight = None

    def close(self) -> None:
        """Lets the save in flight come to its end, whatever that is."""
        if self._thread is not None:
            with waiting_for(self._id):
                self._thread.shutdown()

    def _copied(self, tensors: checkpoint.Contents) -> checkpoint.Contents:
        """The pieces with what they are now, in buffers; those that another process writes are left out."""
        old, self._buffers = self._buffers, {}
        copies = {kind: [self._copy(kind, p, old) for p in pieces if p.writes] for kind, pieces in tensors.items()}
        if any(p.tensor.is_cuda for pieces in tensors.values() for p in pieces):
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy(self, kind: str, piece: Piece, old: dict[tuple[str, str], Tensor]) -> Piece:
        source, key = piece.tensor.detach(), (kind, piece.name)
        buffer = old.pop(key, None)
        if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        self._buffers[key] = buffer.copy_(source, non_blocking=source.is_cuda)
        return replace(piece, tensor=buffer)
