"""A sweep in its folder: cells as ordinary training runs, each with a schedule of its own length.

    OUT / sweep.json      the design, and the names of its cells
        / results.jsonl   a line per finished or failed cell; results-*.jsonl those of job arrays
        / cells/HASH/     its run folder
        / runs.csv        the runs that ended, as `nativerank scaling fit` and other programs read them
        / table.md        the same for people, after every run

More sizes, budgets, methods, rates or seeds may join a folder: what has run is not run again, and what an earlier use
planned stays part of the sweep.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nativerank.experiments.expect import seconds_for
from nativerank.experiments.grid import run_grid
from nativerank.experiments.request import put
from nativerank.experiments.results import RESULTS, finished, outcome, outcomes
from nativerank.scaling.cells import Planned, subject_of
from nativerank.scaling.design import SWEEP, Design, read_sweep
from nativerank.scaling.ray_trials import run_trials
from nativerank.scaling.records import write_csv
from nativerank.scaling.sources import run_of
from nativerank.train.setup import open_data

RUNS, TABLE = "runs.csv", "table.md"
MOST_EPOCHS = 4  # up to which repeated tokens are almost as good as new ones (Muennighoff et al. 2023)
FIXED = ("convention", "count", "common", "params_unit")  # what every use of a folder shares


def claim(folder: Path, design: Design, cells: Sequence[Planned]) -> None:
    """Makes the folder and writes what it is for.

    Raises:
        ValueError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; choose another --out")
    before = read_sweep(folder)
    if before is None and folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no sweep; choose another --out")
    now = json.loads(json.dumps(design.as_dict()))
    if before and (changed := differences(before["design"], now)):
        raise ValueError(f"{folder} holds another sweep, which differs in {', '.join(changed)}; choose another --out")
    names = list(dict.fromkeys([*(before["cells"] if before else ()), *(planned.cell.name for planned in cells)]))
    folder.mkdir(parents=True, exist_ok=True)
    put(folder / SWEEP, json.dumps({"design": now, "cells": names}, indent=1) + "\n")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two designs for one folder must agree in, and do not."""
    changed = [key for key in FIXED if key != "common" and before[key] != now[key]]
    keys = sorted(before["common"].keys() | now["common"].keys())
    return changed + [key for key in keys if before["common"].get(key) != now["common"].get(key)]


def run_sweep(
    design: Design,
    cells: Sequence[Planned],
    folder: Path,
    jobs: int = 1,
    say: Callable[[str], None] = print,
    only: int | None = None,
    minutes: float | None = None,
    trials: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Runs what has no result yet; returns {"cells": rows of the results, "planned", "done", "failed", "left"}.

    Args:
        design, cells: what `plan_cells` made of what.
        folder: of the sweep.
        jobs: runs side by side, which share the threads.
        say: told about every run that ends.
        only: the number of the one cell to run, as a task of a job array.
        minutes: after which no run is started and those that run are stopped, to go on another time.
        trials: {"cpu", "gpu"} of each run as a trial of Ray Tune, instead of processes here.

    Raises:
        ValueError: the folder holds something else, or there is no cell of this number.
    """
    if only is not None and not 0 <= only < len(cells):
        raise ValueError(
            f"--cell is 0 to {len(cells) - 1}, the number of a cell in `nativerank scaling plan`, got {only}"
        )
    claim(folder, design, cells)
    by_name = {planned.cell.name: planned for planned in cells}
    chosen = list(cells) if only is None else [cells[only]]
    say(expectation(chosen, folder, jobs))
    say(repetition(chosen))

    def told(line: str) -> None:
        say(line)
        if only is None:  # tasks of an array must not write one file
            write_files(design, folder)

    if trials is not None:
        ran = run_on_ray(cells, folder, trials, told)
    else:
        ran = run_grid(
            [planned.cell for planned in chosen],
            folder,
            jobs,
            told,
            about=lambda cell: by_name[cell.name].row(),
            name=lambda cell: named(by_name[cell.name]),
            minutes=minutes,
            results=RESULTS if only is None else f"results-{chosen[0].cell.name}.jsonl",
        )
    if only is None:
        write_files(design, folder)
    done, failed = finished(folder), sum("error" in row for row in ran)
    ready = sum(planned.cell.name in done for planned in chosen)
    counts = {"planned": len(chosen), "done": ready, "failed": failed, "left": len(chosen) - ready - failed}
    return {**counts, "cells": ran}


def run_on_ray(
    cells: Sequence[Planned], folder: Path, trials: Mapping[str, float], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Runs what has no result as trials; the rows of all cells that ended."""
    done = finished(folder)
    todo = [number for number, planned in enumerate(cells) if planned.cell.name not in done]
    run_trials(todo, [cells[number].cell.name for number in todo], folder, trials, say)
    rows = outcomes(folder)
    return [rows[planned.cell.name] for planned in cells if planned.cell.name in rows]


def write_files(design: Design, folder: Path) -> None:
    """runs.csv and table.md of the runs of a sweep that ended."""
    sweep, done = read_sweep(folder), finished(folder)
    assert sweep is not None
    if rows := [done[name] for name in sweep["cells"] if name in done]:
        write_csv([run_of(row, design, folder) for row in rows], folder / RUNS)
        put(folder / TABLE, table(design, rows))


def named(planned: Planned) -> str:
    """A run, where it is told about."""
    ratio = "" if planned.rank_ratio is None else f" {planned.rank_ratio:g}"
    return (
        f"{planned.budget:.3g} FLOPs, {planned.method}{ratio}, {planned.size}, lr {planned.lr:g}, seed {planned.seed}"
    )


def expectation(cells: Sequence[Planned], folder: Path, jobs: int) -> str:
    """One line on what is about to run."""
    done = finished(folder)
    todo = [planned for planned in cells if planned.cell.name not in done]
    runs, ready = f"{len(cells)} run{'s' * (len(cells) != 1)}", len(cells) - len(todo)
    if not todo:
        return f"{runs}, all done"
    known = [(row["flops"]["exact"], row["seconds"]) for row in done.values() if row.get("seconds")]
    on_cpu = all(subject_of(planned.source).config.device == "cpu" for planned in todo)
    seconds = seconds_for([planned.flops["exact"] for planned in todo], known, jobs, on_cpu)
    time = "time known after the first" if seconds is None else f"about {max(1, round(seconds / 60))} min to go"
    return f"{runs}{f' ({ready} done)' if ready else ''}, {jobs} at a time: {time}"


def repetition(cells: Sequence[Planned]) -> str:
    """One line on how often the longest run reads the data."""
    longest = max(cells, key=lambda planned: planned.tokens)
    known = training_tokens(longest.source)
    times = longest.tokens / known
    line = f"data: {known:,} training tokens, of which the longest run reads {longest.tokens:,} ({times:.1f} times)"
    if times <= MOST_EPOCHS:
        return line
    return (
        f"{line}; tokens read more than {MOST_EPOCHS} times are worth less than new ones, so laws bend: give more data"
    )


def training_tokens(source: str) -> int:
    """Of the data that settings (JSON) name."""
    return open_data(subject_of(source).config, quiet=True).split("train").tokens


COLUMNS = ("budget", "method", "ratio", "size", "N", "tokens", "tokens/N", "steps", "lr", "seed", "val loss", "minutes")


def table(design: Design, rows: Sequence[dict[str, Any]]) -> str:
    """table.md."""
    head = [f"# {len(rows)} runs", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    order = sorted(
        rows, key=lambda r: (r["budget"], r["method"], r["rank_ratio"] or math.inf, r["params"][design.count])
    )
    lines = [f"| {' | '.join(cells_of(row, design))} |" for row in order]
    commits = ", ".join(sorted({str(row["commit"]) for row in rows}))
    note = f"Budgets by the convention {design.convention}, N: {design.count}. Loss in nats/token. Commit {commits}."
    return "\n".join([*head, *lines, "", note, ""])


def cells_of(row: Mapping[str, Any], design: Design) -> list[str]:
    """A row of the table."""
    params = row["params"][design.count]
    loss = f"{row['val_loss']:.4f}" if "val_loss" in row else outcome(dict(row)).replace("|", "/")
    ratio = "" if row["rank_ratio"] is None else f"{row['rank_ratio']:g}"
    size = [row["size"], f"{params:,}", f"{row['tokens']:,}", f"{row['tokens'] / params:.3g}", f"{row['steps']:,}"]
    minutes = f"{row['seconds'] / 60:.1f}" if row.get("seconds") else ""
    return [f"{row['budget']:.3g}", row["method"], ratio, *size, f"{row['lr']:g}", str(row["seed"]), loss, minutes]
