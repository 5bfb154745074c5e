"""How the C library hands out the memory of tensors on a CPU; to be asked before PyTorch is imported.

glibc answers requests above a threshold with pages of their own, which go back to the system when they are freed. Left
alone it raises that threshold to 32 MB as it goes, and what is freed below it stays in a heap with holes: a training
step of `spectron-s` (4 x 512 tokens, blocks run again) then peaks at 2.6 GB where 1.8 GB are in use. A threshold of
4 MiB gives those back. New pages cost a fault each: 2.3 s of that step's 16.6 s of processor time, of which pages of
2 MiB, which PyTorch asks for if told to, left 0.3 s; at width 512 (`bench train`) a step took 1.45 times as long all
the same. So only those get it who chose less memory for more time (`config.saves_memory`).
"""

import ctypes
import os
import sys
from contextlib import suppress

THRESHOLD_BYTES = 4 << 20
M_MMAP_THRESHOLD = -3  # of malloc.h
OWN_CHOICE = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")  # a user's, of threshold or of allocator
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # read by PyTorch at its first allocation
# The same for a process that is started.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(THRESHOLD_BYTES), HUGE_PAGES: "1"}


def give_back_freed_memory() -> None:
    """Large freed tensors go back to the system at once, for the rest of this process.

    Where an environment variable says otherwise, or there is no glibc, nothing is changed.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in OWN_CHOICE):
        return
    os.environ.setdefault(HUGE_PAGES, "1")
    with suppress(OSError, AttributeError):  # musl has no mallopt
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES)
