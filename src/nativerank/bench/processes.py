"""One of the processes that `bench distributed` starts: training steps on every grid by turns, then the contest of
`bench.once`. Process 0 prints the result as a line of JSON.

    python -m nativerank.bench.processes '{"rank": 0, "world": 2, "store": FILE, ...}'
"""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from nativerank.accounting.traffic import exchanged_bytes, phase_bytes
from nativerank.bench.measure import rounds
from nativerank.bench.once import measure_once
from nativerank.bench.sent import Sent
from nativerank.config import RunConfig
from nativerank.distributed.grid import SINGLE, Grid, make_grid
from nativerank.methods import build_optimizer, factorize, find_method
from nativerank.models import find_preset, hf_config, materialize, skeleton
from nativerank.train.setup import spread
from nativerank.train.step import Batch, StepResult, train_step

ONCE_ON = 2  # processes
PHASES = ("forward", "backward", "clip", "optimizer")
MODES = {"ddp": lambda world: (world, 1), "fsdp": lambda world: (1, world)}


@dataclass(frozen=True)
class Job:
    """What all processes of a group do.

    Args:
        rank, world, store: of this process, and the file through which they meet.
        preset, method: what is trained.
        repeats: recorded steps of each contestant.
    """

    rank: int
    world: int
    store: str
    preset: str
    method: str
    repeats: int

    def words(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


class Contestant:
    """A model on a grid with its optimizer."""

    def __init__(self, job: Job, grid: Grid, mode: str, algebra: str):
        self.grid, self.mode, self.algebra = grid, mode, algebra
        preset, row = find_preset(job.preset), find_method(job.method)
        model = skeleton(hf_config(preset))
        if row.layer:
            factorize(model, job.method, rank_ratio=preset.ratio, rank=preset.value)
        materialize(model, seed=0, init_scale=row.rates.init_scale, init="sampled").train()
        self.forward, _ = spread(RunConfig(method=job.method), model, grid)
        self.model, self.optimizer = model, build_optimizer(model, job.method, grid=grid, algebra=algebra)
        self.steps: list[StepResult] = []

    def step(self, batch: Batch, **how: Any) -> StepResult:
        """One update, begun together."""
        if self.grid.world > 1:
            dist.barrier()
        return train_step(self.forward, self.optimizer, [batch], accumulation=1, clip=1.0, grid=self.grid, **how)

    def counted_step(self, batch: Batch) -> Sent:
        """One more, of which every exchange is counted: of gradients (and weights), then of the optimizer."""
        with Sent("gradients") as traffic:

            def accept(loss: float, grad_norm: float) -> bool:
                traffic.phase = "optimizer"
                return True

            self.step(batch, accept=accept)
        return traffic

    def summary(self, batch: Batch) -> dict[str, Any]:
        """Seconds of every recorded step, the loss of the last one, and bytes counted and foretold."""
        seconds = {phase: [step.seconds[phase] for step in self.steps] for phase in PHASES}
        seconds["step"] = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
        found: dict[str, Any] = {"mode": self.mode, "seconds": seconds, "loss": self.steps[-1].loss}
        if self.grid.world == 1:
            return found
        traffic, layout = self.counted_step(batch), self.optimizer.layout
        foretold = sum(phase_bytes(layout.units, layout.groups, self.grid).values(), torch.zeros(()))
        gradients = exchanged_bytes(self.model, self.grid, True, None, None)
        return found | {
            "algebra": self.algebra,
            "bytes": dict(traffic.bytes),
            "collectives": dict(traffic.collectives),
            "foretold": {
                "gradients": gradients["total"],
                "optimizer": foretold[self.grid.replica, self.grid.shard].item(),
            },
        }


def steps_by_turns(job: Job) -> list[dict[str, Any]]:
    """Every mode and algebra on one global batch."""
    preset = find_preset(job.preset)
    kinds = [("none", "auto")] if job.world == 1 else [(mode, way) for mode in MODES for way in ("gram", "owner")]
    grids = {mode: make_grid(*shape(job.world), "cpu") for mode, shape in MODES.items()} if job.world > 1 else {}
    contestants = [Contestant(job, grids.get(mode, SINGLE), mode, way) for mode, way in kinds]
    generator = torch.Generator().manual_seed(0)
    each, batch = preset.batch_size // job.world, None
    for in_order, counts in rounds(contestants, job.repeats, warmup=2):
        ids = torch.randint(preset.vocab_size, (preset.batch_size, preset.context + 1), generator=generator)
        own = ids[job.rank * each : (job.rank + 1) * each]
        batch = own[:, :-1], own[:, 1:], None
        for contestant in in_order:
            result = contestant.step(batch)
            if counts:
                contestant.steps.append(result)
    assert batch is not None
    return [contestant.summary(batch) for contestant in contestants]


def run(job: Job) -> dict[str, Any]:
    """Everything that is measured with this number of processes."""
    torch.set_num_threads(1)
    if job.world > 1:
        store = dist.FileStore(job.store, job.world)
        dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.world)
    try:
        found: dict[str, Any] = {"processes": job.world, "steps": steps_by_turns(job)}
        if job.world == ONCE_ON:
            found["once"] = measure_once(make_grid(1, job.world, "cpu"), job.repeats)
    finally:
        if job.world > 1:
            dist.destroy_process_group()
    return found


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]))
    result = run(job)
    if job.rank == 0:
        print(json.dumps(result))
