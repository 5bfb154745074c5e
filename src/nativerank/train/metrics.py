"""metrics.jsonl: one JSON object a line, append-only, readable while the run goes on.

Keys of a step's row: step, tokens, loss (nats/token), lr, aux_lr, grad_norm (before clipping), tokens_per_second,
seconds, train_flops (forward and backward since step 0, at the ranks of each step), optimizer_share (share of the
step's time; on CUDA only at probed steps), peak_memory_bytes; on a GPU whose peak is known mfu (exact FLOPs of forward
and backward, rank-aware, attention and head included, recomputation not counted, over the bfloat16 peak; docs/plan.md);
with a teacher distill_loss, T^2 KL(teacher || model) in
nats/token, while loss stays that of the text, and train_flops counts the teacher's forward pass too; for self-guided
guide_alpha, the guide's weight in this step; at some steps val_loss and probes ({module: {...}}, see below); with
parallel.diloco, where a round ends, outer. A step that the guard judged carries `event` (loss_spike, sigma_spike,
gradient_not_finite, loss_not_finite), `action` (skip, rollback, none, stop) and after a rollback `rolled_back_to`; the
steps it undid stay in the file and come again, so the last row of a step is the one that counts. With optim.layerwise a
loss is judged before there are gradients (grad_norm is then "nan"), and `kept` counts the parameters that had moved
before a gradient that is not finite ended the step. Other rows with `event` (start, resume, ranks, checkpoint_damaged,
tracker_failed, interrupted, end) carry what belongs to the event; that of a start on many processes has their
`replicas` and `shards`, and as `uneven` the matrices that are not cut along their long side, and that of any start or
resume the `ranks` {module: rank} from which it goes on, with --track also `tracked` {by, id, look}; the one of the end
counts `refused_steps` and has `parameters`, `train_flops`, the `ranks` of every matrix and the `mfu` of all steps since
start or resume; tracker_failed says which `tracker` was left behind and for what `reason`. `ranks`: a look at the
spectra after this step changed some: `ranks` {module: [before, after]}, `energy` {module: share of ||W||_F^2 that is
left}, and from now on `parameters` and `train_flops_per_token`.

probes, of each probed matrix W (the formulas: docs/math.md, "What is recorded"): update_norm (||dW||_2 of this step,
weight decay included, 0 if the guard refused it), sigma_W (||W||_2), stable_rank, output_change (RMS change of the
layer's output on a fixed batch); where W = A B^T also sigma_A, sigma_B and gauge (their ratio); where the rule has
them cap_factor, rho and update_ratio (update_norm / lr; with rho, lr is the bound on update_norm, weight decay apart).
Norms are those of after the step.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Something that wants to see every row; services of others are in `trackers`."""

    def row(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends rows to metrics.jsonl, each flushed; a resumed run drops the rows after its checkpoint first."""

    def __init__(self, folder: Path, from_step: int):
        self.file = folder / FILE
        if self.file.exists():
            _keep_until(self.file, from_step)
        self.stream = self.file.open("a", encoding="utf-8")

    def row(self, row: dict[str, Any]) -> None:
        self.stream.write(json.dumps(finite(row)) + "\n")
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Every complete row of a run; a last line cut off by a crash is left out."""
    return read_lines(folder)[0]


def read_lines(folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(complete rows, numbers from 1 of lines that are none); a last line cut off by a crash is neither."""
    text = (folder / FILE).read_text(encoding="utf-8")
    rows, damaged, lines = [], [], text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if line.strip() and (number < len(lines) or text.endswith("\n")):
                damaged.append(number)
    return rows, damaged


def _keep_until(file: Path, step: int) -> None:
    """Rewrites the file with the rows up to a step, atomically."""
    kept = [row for row in read_rows(file.parent) if row.get("step", 0) <= step]
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(partial, file)


def finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes a string."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
