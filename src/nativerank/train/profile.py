"""A profile of a few steps: a trace for chrome://tracing or Perfetto, and a table of the costliest operators."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARMUP, ACTIVE = 3, 1, 5


class Profiler:
    """Profiles ACTIVE steps after WAIT + WARMUP, then writes profile/trace.json and profile/table.txt.

    A shorter run gets what there is of the ACTIVE steps, or nothing.
    """

    def __init__(self, out: Path, device: torch.device):
        self.folder = out / "profile"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self.by = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
        )
        self.profile.start()
        self.running = True

    def step(self) -> None:
        """Call after every optimizer step."""
        if self.running:
            self.profile.step()

    def close(self) -> None:
        """Ends profiling, so that what follows the last step is not in the trace."""
        if self.running:
            self.running = False
            self.profile.stop()

    def _write(self, finished: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self.folder / "trace.json"))
        table = finished.key_averages().table(sort_by=self.by, row_limit=40)
        (self.folder / "table.txt").write_text(table, encoding="utf-8")
