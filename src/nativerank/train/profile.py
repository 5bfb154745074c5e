"""A profile of a few steps: a trace for chrome://tracing or Perfetto, a table of the costliest operators, and one of
the parts of the model (`train.parts`).
"""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from nativerank.train.parts import Names, Row, gflop_of, parts_of, rows_of, table, times

WAIT, WARMUP, ACTIVE = 3, 1, 5
LEAST = WAIT + WARMUP + 1  # steps of which one is profiled


class Profiler:
    """Profiles ACTIVE steps after WAIT + WARMUP, then writes trace.json, table.txt, parts.txt and parts.json.

    A shorter run gets what there is of the ACTIVE steps, or nothing.

    Args:
        folder: to write into, made when there is something.
        model: whose parts get names, from WAIT on and until the profile ends.
        context: of its sequences. tokens: of a step in this process. compiled: its blocks are.
        facts: written beside the numbers.
    """

    def __init__(
        self, folder: Path, model: nn.Module, context: int, tokens: int, compiled: bool, facts: dict[str, Any]
    ):
        self.folder, self.model, self.compiled, self.facts = folder, model, compiled, facts
        self.on_device = next(model.parameters()).is_cuda
        self.gflop: Callable[[], dict[str, float]] = lambda: gflop_of(model, context, tokens, compiled)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.on_device else [])
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
        )
        self.profile.start()
        self.running, self.steps = True, 0
        self.names: Names | None = None
        self.rows: list[Row] = []

    def step(self) -> None:
        """Call after every optimizer step."""
        if not self.running:
            return
        self.steps += 1
        if self.steps == WAIT:
            self.names = Names(parts_of(self.model, self.compiled))
            gc.collect()  # what building the model left: a pause as long as a small model's step
        self.profile.step()
        if self.steps == WAIT + WARMUP + ACTIVE:
            self.close()

    def close(self) -> None:
        """Ends profiling, so that what follows the last step is not in the trace."""
        if self.running:
            self.running = False
            self.profile.stop()
            if self.names:
                self.names.remove()

    def _write(self, finished: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self.folder / "trace.json"))
        by = f"self_{'cuda' if self.on_device else 'cpu'}_time_total"
        operators = finished.key_averages().table(sort_by=by, row_limit=40)
        (self.folder / "table.txt").write_text(operators, encoding="utf-8")
        found, wall, steps = times(finished.events() or [], self.on_device)
        if not steps:
            return
        self.rows = rows_of(found, steps, self.gflop(), wall, self.on_device)
        parts = [row._asdict() | {"total_milliseconds": row.total} for row in self.rows]
        values = {**self.facts, "steps": steps, "step_milliseconds": wall / steps, "parts": parts}
        (self.folder / "parts.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (self.folder / "parts.txt").write_text(table(self.rows), encoding="utf-8")
