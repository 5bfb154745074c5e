"""Training on several processes of this machine: seconds and bytes of a step, and r x r problems solved once.

| part | what is done |
|---|---|
| steps | 1, 2 and 4 processes over gloo, one thread each: ddp and fsdp, gram and owner, by turns on one global batch |
| once | on 2: `bench.once`, orthogonalization and retraction of 24 factors of (2048, 64) against gathering and QR |
| paper | instead of all that: `bench.paper`, models of any size on as many processes as wanted, nothing measured |

Processes share the cores there are, so with more of them than cores a step takes longer; what means something are the
ratios of contestants on the same processes, and the bytes, which are a process's own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from nativerank.bench.measure import check_sizes, ratio
from nativerank.bench.once import COUNT, D, R
from nativerank.bench.paper import bench_paper
from nativerank.bench.processes import ONCE_ON, Job
from nativerank.bench.record import record
from nativerank.methods import find_method
from nativerank.models import find_preset

PATIENCE = 600.0  # seconds


def bench_distributed(
    preset_name: str | None = None,
    method: str = "spectron",
    processes: Sequence[int] = (1, 2, 4),
    repeats: int = 7,
    paper: bool = False,
    replicas: int = 1,
    shards: int = 64,
) -> dict[str, Any]:
    """Starts the processes, or counts on paper.

    Args:
        preset_name: what is trained; None is demo, and on paper the models of the record.
        method: row of the method table.
        processes: how many, each number by itself. repeats: recorded rounds, after two unrecorded.
        paper: count instead of measuring. replicas, shards: the grid of a preset on paper.

    Raises:
        ValueError: sizes below 1, a preset that does not divide, or a process that failed.
    """
    if paper:
        return bench_paper(preset_name, method, replicas, shards)
    preset_name = preset_name or "demo"
    preset, _ = find_preset(preset_name), find_method(method)
    check_sizes(repeats=repeats)
    for count in processes:
        check_sizes(processes=count)
        if preset.batch_size % count:
            raise ValueError(f"{preset.batch_size} sequences of {preset_name} do not divide among {count} processes")
    with tempfile.TemporaryDirectory() as folder:
        groups = [
            in_processes([Job(rank, n, f"{folder}/{n}", preset_name, method, repeats) for rank in range(n)])
            for n in processes
        ]
    settings = {"preset": preset_name, "method": method, "tokens_per_step": preset.batch_size * preset.context}
    once = {"shape": [COUNT, D, R], "processes": ONCE_ON, "tasks": [t for g in groups for t in task_rows(g)]}
    steps = [row for group in groups for row in step_rows(group)]
    return record(
        "distributed",
        settings | {"processes": list(processes), "repeats": repeats},
        steps,
        torch.device("cpu"),
        once=once,
    )


def step_rows(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of a group's contestants."""
    return [
        {
            "processes": group["processes"],
            **row,
            "seconds": {phase: statistics.median(times) for phase, times in row["seconds"].items()},
        }
        for row in group["steps"]
    ]


def task_rows(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of the ways of each task, and how many times as fast as gathering and QR on every process."""
    return [
        {
            **row,
            "seconds": {way: statistics.median(times) for way, times in row["seconds"].items()},
            "speedup": {way: ratio(row["seconds"]["gather-qr"], times) for way, times in row["seconds"].items()},
        }
        for row in group.get("once", [])
    ]


def in_processes(jobs: Sequence[Job]) -> dict[str, Any]:
    """What process 0 prints.

    Raises:
        ValueError: one of them failed, with the last line that it wrote.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = [stack.enter_context(started_process(job, folder / str(job.rank))) for job in jobs]
        until = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            if time.monotonic() > until:
                raise ValueError(f"{len(jobs)} processes were not done after {PATIENCE:.0f} s")
            time.sleep(0.05)
        for rank, process in enumerate(started):
            if process.poll():
                said = (folder / f"{rank}.err").read_text().strip().splitlines() or ["nothing"]
                raise ValueError(f"process {rank} of {len(jobs)} ended with {process.poll()} and said: {said[-1]}")
        found: dict[str, Any] = json.loads((folder / "0.out").read_text().splitlines()[-1])
    return found


@contextmanager
def started_process(job: Job, files: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes into files with these names, and is gone when the block ends."""
    command = [sys.executable, "-m", "nativerank.bench.processes", job.words()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with files.with_suffix(".out").open("w") as out, files.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
