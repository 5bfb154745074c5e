"""A run whose guard is answered, and whose records are written: events, rollbacks, the end by divergence."""

from pathlib import Path
from typing import Any

from nativerank.config import RunConfig
from nativerank.data.shards import Dataset
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.train.guard import Diverged
from nativerank.train.listen import Listener
from nativerank.train.metrics import FILE, JsonLines, Tracker, read_rows
from nativerank.train.setup import Built
from nativerank.train.state import RunState, described
from nativerank.train.trackers import Mirror


class GuardedRun(RunState):
    """The state of a run, with those who hear of it.

    Args:
        listener: shows it to a person. The others as of `RunState`.
    """

    def __init__(
        self, config: RunConfig, out: Path, dataset: Dataset, built: Built, listener: Listener, grid: Grid = SINGLE
    ):
        self.listener = listener
        self.trackers: list[Tracker] = []
        super().__init__(config, out, dataset, built, self._complain, grid)

    def _open_trackers(self) -> None:
        """metrics.jsonl, and the service that --track names."""
        track, old = self.config.track, self.out / FILE
        before = read_rows(self.out) if track != "none" and old.exists() else []
        self.trackers.append(JsonLines(self.out, self.step))  # drops what comes again
        if track != "none":
            self.trackers.append(Mirror(self.config, self.out, self.step, before, self._untracked))

    def tracked(self) -> dict[str, Any]:
        """`tracked` of the row of a start: who shows the run, under which name."""
        for tracker in self.trackers:
            if isinstance(tracker, Mirror) and tracker.service:
                return {"tracked": {"by": self.config.track, "id": tracker.service.id, "look": tracker.service.look}}
        return {}

    def _untracked(self, error: Exception) -> None:
        """Notes that a service was left behind."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.listener.warn(f"--track {self.config.track} stopped, training goes on: {reason}")
        self._record({"event": "tracker_failed", "step": self.step, "tracker": self.config.track, "reason": reason})

    def _record(self, row: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.row(row)
        self.listener.row(row)

    def _respond(self, event: str, row: dict[str, Any]) -> str:
        """Acts on an event: notes it in the row, and sets the run back if that is the answer, which it returns."""
        last = self.last_good() if self.guard.may_go_back(event) else None
        try:
            answer = self.guard.response(event, last is not None)
            if answer == "rollback" and self.rollbacks >= self.config.guard.max_events:
                raise Diverged(f"{self.rollbacks} rollbacks to step {last.step if last else 0}; lower --optim.lr")
        except Diverged as error:
            last = last or self.last_good()
            row.update(event=event, action="stop")
            self._record(row)
            raise Diverged(f"step {self.step}: {error}; {described(last)}") from None
        row.update(event=event, action=answer)
        kept = f", but {row['kept']} parameters had moved" if row.get("kept") and answer != "rollback" else ""
        self.listener.warn(f"step {self.step}: {event.replace('_', ' ')} (loss {row['loss']:.3f}): {answer}{kept}")
        if answer == "rollback" and last is not None:
            self.go_back(last.path)
            row["rolled_back_to"] = self.step
        return answer

    def _complain(self, message: str) -> None:
        self.listener.warn(message)
        self._record({"event": "checkpoint_damaged", "step": self.step, "reason": message})

    def _judge_norms(self, row: dict[str, Any]) -> None:
        """Lets the guard look at the norms of the probed factors."""
        sigmas = {f"{n}.{k}": v[k] for n, v in row["probes"].items() for k in ("sigma_A", "sigma_B") if k in v}
        event = self.guard.judge_norms(sigmas)
        if event and self._respond(event, row) == "none":
            self.guard.sigmas = sigmas  # nothing to go back to: from here on these are the norms to compare with
