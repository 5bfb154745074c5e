"""Signs of life of the processes of a run, and what may be concluded from them.

Each process says about once a second: which step it is in, how often it got somewhere, whether the stack of its main
thread moved since the last sign, and where that thread is. Whoever watches keeps, by its own clock (hosts disagree
about the time), when each process last gave any sign and when it last got somewhere. Then

    no sign of a process for `timeout` seconds            it is stopped, or its host is gone
    no progress of any process for `timeout` seconds      the run hangs, for its processes wait for each other
    a sign that says it left, for what reason             it failed

Inside a training step progress is a micro-batch or the step's end. Elsewhere (the first step, which compiles;
validation, checkpoint, export) a main thread whose stack moves is progress too, so that nothing long is taken for a
hang.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType

FAILED_SECONDS = 10.0  # after a process said that it failed, the others may notice by themselves
# Where this package waits for other processes. With nccl a collective only starts there; the wait is for its result.
WAITS = ("distributed/agree.py:", "distributed/gradients.py:", "distributed/collectives.py:")
AWAITED: list[int] = []  # threads that the main thread waits for, the last one at this moment


@contextmanager
def waiting_for(thread: int) -> Iterator[None]:
    """For the block the main thread waits for this one of its own process, which then shows where the process is."""
    AWAITED.append(thread)
    try:
        yield
    finally:
        AWAITED.pop()


@dataclass(frozen=True)
class Sign:
    """What a process says of itself.

    Attributes:
        count: of its signs. step: that its main thread is in. marks: how often it got somewhere.
        moves: signs before which the stack of the main thread had moved. loose: whether those are progress now.
        where: innermost line of this package on that stack. waits: whether it waits for others there.
        host, pid: for whoever looks for it. left: None while it is there, then why it left, "" at a good end.
    """

    count: int = 0
    step: int = 0
    marks: int = 0
    moves: int = 0
    loose: bool = True
    where: str = ""
    waits: bool = False
    host: str = ""
    pid: int = 0
    left: str | None = None

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: bytes) -> "Sign":
        return Sign(**json.loads(text))


@dataclass
class Seen:
    """The last sign of a process, and when, by the watcher's clock, it came and the process last got somewhere."""

    heard: float
    moved: float
    sign: Sign = field(default_factory=Sign)

    def take(self, sign: Sign, now: float) -> None:
        """Notes a sign, which may be one that is known already."""
        if sign.count == self.sign.count:
            return
        old, self.sign, self.heard = self.sign, sign, now
        if sign.marks != old.marks or (sign.loose and sign.moves != old.moves):
            self.moved = now


def lost(board: dict[int, Seen], now: float, timeout: float) -> str | None:
    """The line for a process that failed, or of which nothing is heard any more; None if there is none."""
    # Of those that failed the first one did for a reason of its own.
    failed = sorted((seen.heard, rank) for rank, seen in board.items() if seen.sign.left)
    if failed and now - failed[0][0] >= min(timeout, FAILED_SECONDS):
        return gone({failed[0][1]: board[failed[0][1]].sign})
    silent = {rank: s for rank, s in board.items() if s.sign.left is None and now - s.heard >= timeout}
    if not silent:
        return None
    return f"no sign of life for {max(now - seen.heard for seen in silent.values()):.0f} s: {places(silent)}"


def verdict(board: dict[int, Seen], now: float, timeout: float) -> str | None:
    """What ends the run, as one line that names the processes; None if nothing does."""
    if line := lost(board, now, timeout):
        return line
    here = {rank: seen for rank, seen in board.items() if seen.sign.left is None}
    quiet = now - max((seen.moved for seen in here.values()), default=now)
    if quiet < timeout:
        return None
    stuck = suspects(here)
    others = {rank: seen for rank, seen in here.items() if rank not in stuck}
    line = f"no progress for {quiet:.0f} s (--parallel.timeout): {places(stuck)}"
    return f"{line}; {places(others)}" if others else line


def gone(which: dict[int, Sign]) -> str:
    """The line for processes that failed, or of which nothing is heard any more."""
    sign = which[min(which)]
    why = f": {sign.left}" if sign.left else f"{where_of(sign)}: killed, or its host is gone"
    return f"{ranks(which)} {'has' if len(which) == 1 else 'have'} left in step {sign.step}{why}"


def suspects(here: dict[int, Seen]) -> dict[int, Seen]:
    """Those that the others seem to wait for: behind the others; or not waiting; or elsewhere than most; else all."""
    furthest = max((s.sign.step, s.sign.marks) for s in here.values())
    behind = [rank for rank, s in here.items() if (s.sign.step, s.sign.marks) < furthest]
    busy = [rank for rank, s in here.items() if not s.sign.waits]
    (common, most), *others = Counter(s.sign.where for s in here.values()).most_common(2)
    tie = bool(others) and others[0][1] == most
    elsewhere = [] if tie else [rank for rank, s in here.items() if s.sign.where != common]
    for found in (behind, busy, elsewhere):
        if 0 < len(found) < len(here):
            return {rank: here[rank] for rank in found}
    return here


def ranks(which: Iterable[int]) -> str:
    """rank 2, or ranks 0, 1, 3."""
    numbers = sorted(which)
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'' if len(numbers) == 1 else 's'} {shown}"


def where_of(sign: Sign) -> str:
    """Where to look for a process."""
    return f" (host {sign.host}, pid {sign.pid})" if sign.pid else ""


def places(which: dict[int, Seen]) -> str:
    """Who is where, those at one place together: rank 2 (host h, pid 123) in step 17 at train/loop.py:88 _batches."""
    groups: dict[tuple[int, str, bool], list[int]] = {}
    for rank, seen in sorted(which.items()):
        groups.setdefault((seen.sign.step, seen.sign.where, seen.sign.waits), []).append(rank)
    parts = []
    for (step, where, waits), members in sorted(groups.items(), key=lambda item: len(item[1])):
        who = where_of(which[members[0]].sign) if len(members) == 1 else ""
        does = ("waits " if len(members) == 1 else "wait ") if waits else ""
        parts.append(f"{ranks(members)}{who} {does}in step {step}{f' at {where}' if where else ''}")
    return "; ".join(parts)


def position(frame: FrameType | None, root: str) -> tuple[int, str, bool]:
    """(a number that changes when the stack moves, innermost line below `root`, whether others are waited for there).

    That is so where a collective of PyTorch is below it, or at one of WAITS.
    """
    lines: list[tuple[int, int]] = []
    where, waits = "", False
    while frame is not None:
        code = frame.f_code
        lines.append((id(code), frame.f_lasti))
        name = code.co_filename.replace("\\", "/")
        if not where and name.startswith(root):
            where = f"{name.removeprefix(root)}:{frame.f_lineno} {code.co_name}"
        waits |= not where and "/torch/distributed/" in name
        frame = frame.f_back
    return hash(tuple(lines)), where, waits or where.startswith(WAITS)
