"""What the metrics.jsonl of a cell tells besides its row in results.jsonl; nothing where the file is gone."""

from pathlib import Path
from typing import Any

from nativerank.train.metrics import read_rows

REFUSED = ("loss_spike", "gradient_not_finite", "loss_not_finite")  # events seen before the update, which is left out


def all_rows(run: Path) -> list[dict[str, Any]]:
    """Every row of a run folder's metrics.jsonl."""
    try:
        return read_rows(run)
    except OSError:
        return []


def last_rows(run: Path) -> list[dict[str, Any]]:
    """The rows with a loss that count: the last of each step."""
    rows = [row for row in all_rows(run) if "loss" in row or "val_loss" in row]
    last = {(row.get("step"), row.get("event") == "end"): row for row in rows}
    return [last[key] for key in sorted(last)]


def refused_steps(run: Path) -> int | None:
    """How many updates the guard left out, those of steps that were set back included."""
    rows = all_rows(run)
    return sum(row.get("event") in REFUSED for row in rows) if rows else None


def origin(run: Path) -> dict[str, Any]:
    """`commit` and `threads` of the program that ran the cell, or finished it."""
    found: dict[str, Any] = {}
    for row in all_rows(run):
        if environment := row.get("environment"):
            threads = str(environment.get("machine", "")).rpartition(", ")[2].removesuffix(" threads")
            found = {"commit": environment.get("commit")} | ({"threads": int(threads)} if threads.isdecimal() else {})
    return found
