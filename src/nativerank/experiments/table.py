"""The table of a comparison in Markdown, from what `experiments.summary` says."""

from collections.abc import Sequence
from typing import Any

from nativerank.experiments.arms import COORDINATES

COLUMNS = (
    "#",
    "arm",
    "lr",
    "aux_lr",
    "init_scale",
    "rank",
    "steps",
    "parameters",
    "FLOPs",
    "n",
    "val loss",
    "sd",
    "perplexity",
    "against the first (95%)",
    "s / run",
    "diverged",
    "notes",
)
BAR = r"\|"  # in a cell, where a bare one would end it
CAVEAT = (
    "Short runs at this size are under-trained: the order of the arms is a measurement at this length, not the claim "
    "of a paper. "
)
CAVEATS = {
    "tokens": CAVEAT + "Equal tokens: arms differ in FLOPs.",
    "flops": CAVEAT + "Equal FLOPs: in an under-trained regime whoever makes more steps wins.",
}


def render(record: dict[str, Any], lines: Sequence[str] = ()) -> str:
    """table.md.

    Args:
        record: of `summary`, with a `title`.
        lines: what else was found, a line each.
    """
    parts = [f"# {record['title']}", ""]
    groups = list(dict.fromkeys(entry["group"] for entry in record["arms"]))
    for group in groups:
        parts += [f"## {group}", ""] if group else []
        parts += [*table([entry for entry in record["arms"] if entry["group"] == group]), ""]
    parts += [f"- {line}" for line in lines] + ([""] if lines else [])
    environment = record["environment"]
    kept = not_searched(record)
    if kept:
        what = ", ".join(kept)
        parts += [f"Nobody tried several values of {what}: each arm has the one given, or its own default.", ""]
    parts += [mixed_commits(record), ""] if len(record["commits"]) > 1 else []
    parts += [
        f"{CAVEATS[record['budget']]} Validation loss in nats/token at each arm's best point, mean over seeds; "
        "differences are paired by seed, with Student's 95% interval. FLOPs: training, without the optimizer's own.",
        "",
        f"nativerank {environment['nativerank']} ({environment['commit'][:12]}), torch {environment['torch']}, "
        f"{environment['machine'].rpartition(', ')[0]}{threads(record)}",
    ]
    return "\n".join(parts) + "\n"


def mixed_commits(record: dict[str, Any]) -> str:
    """That the cells are not of one program."""
    found = ", ".join(f"{commit[:12]} ({count(number, 'cell')})" for commit, number in record["commits"].items())
    return f"The cells ran at several commits: {found}."


def threads(record: dict[str, Any]) -> str:
    """How many each run had; nothing where no row says so."""
    numbers = " or ".join(map(str, record["cell_threads"]))
    return f", {numbers} thread{'' if numbers == '1' else 's'} per run" if numbers else ""


def count(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def not_searched(record: dict[str, Any]) -> list[str]:
    """Coordinates of which every arm saw a single value, so that nothing is known about a better one."""
    seen: dict[tuple[str, str], set[float]] = {}
    for cell in record["cells"]:
        for key in COORDINATES:
            if key in cell:
                seen.setdefault((cell["method"], key), set()).add(cell[key])
    varied = {key for (_, key), values in seen.items() if len(values) > 1}
    return [key for key in COORDINATES if key not in varied and any(other == key for _, other in seen)]


def table(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of one group, best mean first, arms without a finished run last."""
    ranked = sorted(entries, key=lambda entry: (entry["mean"] is None, entry["mean"] or 0.0))
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return head + ["| " + " | ".join(cells(rank, entry)) + " |" for rank, entry in enumerate(ranked, 1)]


def cells(rank: int, entry: dict[str, Any]) -> list[str]:
    """One row, in the order of COLUMNS."""
    best = entry["best"] or {}
    return [
        str(rank) if best else "-",
        f"`{entry['label'].replace('|', BAR)}`",
        *(number(best.get(key), ".4g") for key in COORDINATES),
        entry["rank"] or "dense",
        f"{entry['steps']:,}",
        f"{entry['parameters']['total'] / 1e6:.2f}M",
        f"{entry['flops']:.2e}",
        str(entry["n"]),
        number(entry["mean"], ".4f"),
        number(entry["sd"], ".4f"),
        number(entry["perplexity"], ".2f"),
        difference(entry),
        number(entry["seconds"], ".0f"),
        f"{entry['diverged']} of {entry['cells']}" if entry["diverged"] else "0",
        notes(entry),
    ]


def number(value: float | None, form: str) -> str:
    """A value, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def difference(entry: dict[str, Any]) -> str:
    """Mean and interval of the paired difference."""
    found = entry["difference"]
    if entry["label"] == entry["reference"]:
        return "reference"
    if found is None:
        return "-"
    interval = "" if found["low"] is None else f" [{found['low']:+.4f}, {found['high']:+.4f}]"
    return f"{found['mean']:+.4f}{interval}"


def notes(entry: dict[str, Any]) -> str:
    """Best values at the edge of what was tried, cells without a result, steps that the guard refused."""
    words = [f"best {edge['coordinate']} at the {edge['side']} edge" for edge in entry["edges"]]
    if entry["failed"]:
        words.append(f"{entry['failed']} of {entry['cells']} cells failed")
    if entry["refused"]:
        words.append(f"{entry['refused']} of {entry['cells']} cells refused")
    if entry["refused_steps"]:
        steps, runs = count(sum(entry["refused_steps"]), "step"), len(entry["refused_steps"])
        at_best = f", {entry['refused_steps_at_best']} at the best point" if entry["refused_steps_at_best"] else ""
        words.append(f"{steps} refused in {runs} of {entry['cells']} cells{at_best}")
    if not entry["best"]:
        words.append("no run finished")
    return "; ".join(words)
