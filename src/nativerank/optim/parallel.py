"""Independent pieces of work side by side on the cores of a CPU.

Cores cannot share an r x r eigenvalue problem: the second one brings a quarter. One piece per core, each with one
thread inside, uses them all. Pieces of less than a millisecond gain nothing, since Python takes turns between threads.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from nativerank.linalg.host import has_values
from nativerank.linalg.orthogonalize import EIGEN_RANK


def at_once(matrices: Iterable[Tensor]) -> int:
    """How many of these should be worked on together: as many as cores where eigenvalues are used, on a CPU.

    Tensors without values go one after the other: whoever traces sees only the thread it is in.
    """
    ranks = [min(X.shape[-2:]) if X.device.type == "cpu" and has_values(X) else 0 for X in matrices]
    return torch.get_num_threads() if min(ranks, default=0) > 0 and max(ranks) >= EIGEN_RANK else 1


def run_all(pieces: Sequence[Callable[[], Any]], count: int) -> None:
    """Calls every piece, `count` at a time; raises what the first failing one raised."""
    if count == 1:
        for piece in pieces:
            piece()
        return
    started = [_workers(count).submit(piece) for piece in pieces]
    wait(started)  # also where one fails: none may go on writing behind the caller's back
    for done in started:
        done.result()


@functools.cache
def _workers(count: int) -> ThreadPoolExecutor:
    """Threads inside which PyTorch and its math library use one thread; between calls they sleep."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # makes PyTorch set up this thread, which would undo the next line if it came later
        torch.set_num_threads(1)
        started.wait()

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="nativerank", initializer=start)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(before)  # the workers also set what threads started later would inherit
    return pool
