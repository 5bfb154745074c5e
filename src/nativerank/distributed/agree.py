"""What the processes of a run settle between them, so that none goes on alone or waits for one that has given up.

    together     a block that succeeds on every process or raises on every process, with one error line
    equal        the same settings everywhere, or an error that names process and key
    from_first   what the first process made (a folder's name, a choice of checkpoint), or the error that it met
    from_each    what every process made (the hashes of its files), or the first error
    totals       sums of a few numbers, the same bits on every process

One line is enough for a person: an error that all processes raise is `silent` on all but the first. Before there is a
grid they talk through the launcher's store, afterwards through its process group; one process talks to nobody.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nativerank.distributed.grid import Grid

T = TypeVar("T")
FAREWELL_SECONDS = 10.0  # that the first process waits until all have heard an error
START_SECONDS = 600.0  # that processes wait for each other before they know the configuration
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables that torchrun sets


class Agreed(ValueError):
    """An error that every process raises; `silent` where another one prints it."""

    def __init__(self, message: str, silent: bool = False, exit_code: int = 2):
        super().__init__(message)
        self.silent, self.exit_code = silent, exit_code


def launched() -> tuple[int, int]:
    """(rank, number of processes) as the launcher has it in the environment; (0, 1) without one.

    Raises:
        ValueError: WORLD_SIZE speaks of many processes that nobody started.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if missing := [name for name in LAUNCHER if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is {world}, but {missing[0]} is not set; start many processes with torchrun")
    return int(os.environ["RANK"]), world


def restarts() -> int:
    """How often torchrun has started this job again (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@functools.cache
def launcher_store() -> dist.Store:
    """Where processes meet before there is a grid."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
    # torchrun starts a job again with the store of the time before, and what was said in it.
    return dist.PrefixStore(f"attempt-{restarts()}", store)


class _Meetings:
    """Counts the meetings at the launcher's store, each of which has its own keys."""

    count = 0


def fresh_store() -> dist.Store:
    """A part of the launcher's store that nothing has used yet."""
    _Meetings.count += 1
    return dist.PrefixStore(f"nativerank/{_Meetings.count}", launcher_store())


def settle(mine: Any, judge: Callable[[list[Any]], str | None]) -> str | None:
    """Every process hands in a JSON value before there is a grid; the verdict of the first one on all of them."""
    rank, world = launched()
    if world == 1:
        return judge([mine])
    store = fresh_store()
    store.set(f"{rank}", json.dumps(mine))
    if rank == 0:
        values = [json.loads(store.get(f"{other}")) for other in range(world)]
        store.set("verdict", judge(values) or "")
    verdict = store.get("verdict").decode() or None
    if verdict is not None:  # this process is about to end, and the store may be its own
        store.set(f"heard/{rank}", "")
        if rank == 0:
            with suppress(dist.DistError):
                store.wait([f"heard/{other}" for other in range(world)], timedelta(seconds=FAREWELL_SECONDS))
    return verdict


def first_error(lines: Sequence[str | None]) -> str | None:
    """The error of the lowest rank that has one; the first process needs no introduction."""
    for rank, line in enumerate(lines):
        if line is not None:
            return line if rank == 0 else f"rank {rank}: {line}"
    return None


def first_difference(settings: Sequence[Mapping[str, Any]]) -> str | None:
    """Names the first process whose settings, by dotted key, are not those of the first one."""
    for rank, other in enumerate(settings):
        for key, value in settings[0].items():
            if other.get(key) != value:
                return f"rank {rank} has {key} {other.get(key)}, rank 0 has {value}; start every process alike"
    return None


def equal(settings: Mapping[str, Any]) -> None:
    """Makes sure, before there is a grid, that every process has the same settings (JSON values by dotted key).

    Raises:
        Agreed: on all of them, naming process and key.
    """
    if verdict := settle(dict(settings), first_difference):
        raise Agreed(verdict, silent=launched()[0] != 0)


@contextmanager
def together(grid: Grid | None = None) -> Iterator[None]:
    """A block that raises ValueError or OSError on every process if it does on one.

    Collectives are for blocks whose errors of these kinds are the same on all processes, or settled in there. Any other
    error passes at once, for it may have left the others in the middle of something: `watching` tells them.

    Args:
        grid: None before there is one, and anybody who watches: then every error is settled.

    Raises:
        Agreed: on all of them, for what the block raised on one; one process alone raises that.
    """
    # Nobody watches yet: without the line of any error whatever, the others would wait in vain for START_SECONDS.
    settled = Exception if grid is None else (ValueError, OSError)
    failure: Exception | None = None
    try:
        yield
    except settled as error:
        failure = error
    rank, world = launched() if grid is None else (grid.rank, grid.world)
    verdict = _first_of(grid, None if failure is None else one_line(failure)) if world > 1 else None
    if failure is not None and (world == 1 or not isinstance(failure, (ValueError, OSError))):
        raise failure
    if verdict is not None:
        raise Agreed(verdict, rank != 0, getattr(failure, "exit_code", 2)) from failure


def one_line(error: Exception) -> str:
    """The first line of an error, its type where it has none."""
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__


def _first_of(grid: Grid | None, line: str | None) -> str | None:
    if grid is None:
        return settle(line, first_error)
    lines: list[str | None] = [None] * grid.world
    dist.all_gather_object(lines, line, group=grid.everyone)
    return first_error(lines)


def from_first(grid: Grid, make: Callable[[], T]) -> T:
    """What `make` returns on the first process, on all of them.

    Raises:
        Agreed: on all of them, for what it raised there; one process alone raises that.
    """
    if grid.world == 1:
        return make()
    answer: list[Any] = [None, None, 2]  # what was made, or the error line and its exit code
    failure: Exception | None = None
    if grid.rank == 0:
        try:
            answer[0] = make()
        except Exception as error:  # any: the others are in the broadcast below, and leave it with an error only so
            failure = error
            answer[1:] = [one_line(error), getattr(error, "exit_code", 2)]
    dist.broadcast_object_list(answer, group=grid.everyone, group_src=0)
    if failure is not None and not isinstance(failure, (ValueError, OSError)):
        raise failure
    if answer[1] is not None:
        raise Agreed(answer[1], grid.rank != 0, answer[2]) from failure
    made: T = answer[0]
    return made


def from_each(grid: Grid, make: Callable[[], T]) -> list[T]:
    """What `make` returns on every process, by rank; it makes no collective call itself.

    Raises:
        Exception: as `together`.
    """
    with together(grid):
        made = make()
    if grid.world == 1:
        return [made]
    found: list[Any] = [None] * grid.world
    dist.all_gather_object(found, made, group=grid.everyone)
    return found


def totals(values: Sequence[float | Tensor], grid: Grid, device: torch.device) -> list[float]:
    """Sums over all processes, in float64, of a few numbers or scalar tensors: one all-reduce."""
    numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    flat = torch.tensor(numbers, dtype=torch.float64).to(device)
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            flat[place] = value.detach()
    if grid.world > 1:
        dist.all_reduce(flat, group=grid.everyone)
    found: list[float] = flat.tolist()
    return found
