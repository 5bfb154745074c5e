"""What a comparison will run and how long that takes, before anything runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nativerank.experiments.compare import Comparison, Row
from nativerank.experiments.contender import Contender
from nativerank.experiments.grid import Cell, threads_per_cell
from nativerank.experiments.results import finished

# One thread of a cloud CPU at these sizes; what a process does besides its steps. A folder's own results replace both.
FLOPS_PER_SECOND, OVERHEAD_SECONDS = 4e10, 8.0


def rehearse(program: Callable[[Comparison], None], plan: Comparison) -> list[tuple[Contender, Cell]]:
    """The cells a program will run, found by running it against losses that rise on both sides of every start.

    A search that has to walk will need more of them.
    """
    seen: dict[str, tuple[Contender, Cell]] = {}
    twin = Comparison(plan.folder, plan.common, plan.budget, plan.seeds, plan.jobs)

    def imagine(cells: list[Cell], about: Callable[[Cell], Row], name: Callable[[Cell], str]) -> list[Row]:
        rows = []
        for cell in cells:
            contender = twin.contenders[about(cell)["arm"]]
            settings = dict(cell.settings)
            away = sum(abs(math.log(settings[key] / start)) for key, start in contender.start.items() if start)
            seen[cell.name] = contender, cell
            rows.append({"val_loss": away, "imagined": True})
        return rows

    twin.runner = imagine
    program(twin)
    return list(seen.values())


def expected_seconds(cells: Iterable[tuple[Contender, Cell]], folder: Path, jobs: int) -> float | None:
    """Time for the cells that have no result yet; None where nothing is known about the device."""
    done = finished(folder)
    todo = [contender for contender, cell in cells if cell.name not in done]
    known = [(row["flops"], row["seconds"]) for row in done.values() if row.get("seconds") and row.get("flops")]
    return seconds_for([c.flops for c in todo], known, jobs, all(c.device == "cpu" for c in todo))


def seconds_for(todo: Sequence[float], known: Sequence[tuple[float, float]], jobs: int, on_cpu: bool) -> float | None:
    """Time for runs side by side; None where nothing is known about the device.

    Args:
        todo: training FLOPs of each run.
        known: (FLOPs, seconds) of runs that have ended on this machine.
        jobs: runs at a time. on_cpu: whether they run on this machine's CPU.
    """
    if known:
        per_flop = sum(seconds for _, seconds in known) / sum(flops for flops, _ in known)
        overhead = OVERHEAD_SECONDS / 2  # a row's seconds begin after the imports
    elif not on_cpu:
        return None
    else:
        per_flop, overhead = 1 / (FLOPS_PER_SECOND * threads_per_cell(jobs)), OVERHEAD_SECONDS
    return sum(flops * per_flop + overhead for flops in todo) / min(jobs, max(1, len(todo)))
