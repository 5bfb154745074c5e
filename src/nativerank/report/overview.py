"""What stands on top of a run's report, what it cost beside what was planned, and where it ran."""

from typing import Any

import numpy as np

from nativerank.report.charts import Column, Table
from nativerank.report.group_charts import cell
from nativerank.report.run_charts import validations
from nativerank.report.runs import Run, number

ON_GPU = ("peak bytes", "tokens per second")  # what a plan can be held to there alone


def cards(run: Run) -> list[tuple[str, str]]:
    """(name, value) of what one looks for first."""
    facts, end = run.facts, run.end or {}
    _, losses = validations(run)
    found = [("state", run.state)]
    finite = losses[np.isfinite(losses)]
    if len(finite):
        found.append(("validation loss", f"{finite[-1]:.4f} nats/token"))
        found.append(("perplexity", f"{np.exp(finite[-1]):.2f}"))
    if np.isfinite(number(end.get("bits_per_byte"))):
        found.append(("bits per byte", f"{number(end['bits_per_byte']):.3f}"))
    found += [(name, str(facts[name])) for name in ("model", "method") if facts.get(name)]
    counted = end.get("parameters") or facts.get("parameters")
    if isinstance(counted, dict) and np.isfinite(number(counted.get("total"))):
        found.append(("parameters", f"{number(counted['total']) / 1e6:.2f}M"))
    tokens = run.column("tokens")
    if len(tokens) and np.isfinite(tokens[-1]):
        found.append(("tokens", f"{tokens[-1]:,.0f}"))
    speed = run.column("tokens_per_second")
    if np.isfinite(speed).any():
        found.append(("tokens/s, median", f"{np.nanmedian(speed):,.0f}"))
    if facts.get("device"):
        found.append(("device", str(facts["device"])))
    return found


def cost_table(run: Run, planned: dict[str, Any] | str | None) -> Table:
    """What `nativerank plan` says of the run's configuration beside what the run recorded."""
    plan = planned if isinstance(planned, dict) else {}
    counted = (run.end or {}).get("parameters") or run.facts.get("parameters")
    steps, flops = run.last_step, run.column("train_flops")
    rows = [
        ("parameters", get(plan, "params", "total"), get(counted, "total"), ",.0f"),
        ("without embeddings", get(plan, "params", "non_embedding"), get(counted, "non_embedding"), ",.0f"),
        ("training FLOPs so far", steps * get(plan, "flops", "per_step", "exact"), last(flops), ".4g"),
        ("peak bytes", get(plan, "bytes", "peak"), peak_bytes(run), ",.0f"),
        ("tokens per second", get(plan, "time", "tokens_per_second"), median(run.column("tokens_per_second")), ",.0f"),
    ]
    shown = []
    for name, before, after, form in rows:
        comparable = before and np.isfinite(before) and not (on_cpu(run) and name in ON_GPU)
        ratio = after / before if comparable else float("nan")
        shown.append([(name, name), cell(before, form), cell(after, form), cell(ratio, ".3f")])
    columns = [Column("what"), Column("planned", True), Column("measured", True), Column("measured / planned", True)]
    return Table("costs", "Planned and measured", columns, shown, note_on(run, planned))


def on_cpu(run: Run) -> bool:
    """Where it ran."""
    return str(run.facts.get("device", "cpu")).startswith("cpu")


def note_on(run: Run, planned: dict[str, Any] | str | None) -> str:
    """What the numbers are."""
    if planned is None or isinstance(planned, str):
        return f"No plan: {planned}." if planned else ""
    text = "Planned by the run's configuration for this machine. Tokens per second are a bound by its peaks."
    if on_cpu(run):
        text += " On a CPU, measured bytes are those of the whole process, Python and torch included."
    return text


def get(values: Any, *names: str) -> float:
    """A number deep in nested mappings, or NaN."""
    found: Any = values
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return number(found)


def last(values: np.ndarray) -> float:
    """The last number, or NaN."""
    return float(values[-1]) if len(values) else float("nan")


def median(values: np.ndarray) -> float:
    """Of the finite ones, or NaN."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def peak_bytes(run: Run) -> float:
    """The most that was recorded."""
    values = [*run.column("peak_memory_bytes"), number((run.end or {}).get("peak_memory_bytes"))]
    finite = [v for v in values if np.isfinite(v)]
    return max(finite, default=float("nan"))


def environment(run: Run) -> list[tuple[str, str]]:
    """Where the run last started."""
    found = run.facts.get("environment")
    if not isinstance(found, dict):
        return []
    return [("Environment", "\n".join(f"{name}: {value}" for name, value in found.items()))]
