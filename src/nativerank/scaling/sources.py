"""Where runs come from: tables, sweep folders, run folders.

A sweep folder is read by what it says of its cells (sweep.json, results*.jsonl), so its run folders need not be there;
a run folder by its config.yaml and metrics.jsonl. Either has the parameters and FLOPs by every convention.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from nativerank.experiments.results import outcomes
from nativerank.scaling.design import Design, read_sweep
from nativerank.scaling.records import Convention, Count, Run, read_csv, with_budgets

CONVENTION: Convention = "6nd"
COUNT: Count = "total"
Complain = Callable[[str], None]


def read_runs(
    paths: Iterable[Path],
    convention: Convention | None = None,
    count: Count | None = None,
    complain: Complain = lambda line: None,
) -> list[Run]:
    """The runs of tables, sweep folders, run folders and folders that hold run folders, with their budgets.

    Args:
        paths: files and folders.
        convention: of the FLOPs; None is that of a sweep, and else 6nd.
        count: which parameters sweep and run folders give; None is that of a sweep, and else all. A table has one.
        complain: told about cells of a sweep that have no result.

    Raises:
        ValueError: nothing there, or anything wrong with it, named by row and column.
    """
    if convention is not None and convention not in get_args(Convention):
        raise ValueError(f"unknown FLOPs convention {convention!r}, known are {', '.join(get_args(Convention))}")
    if count is not None and count not in get_args(Count):
        raise ValueError(f"unknown count of parameters {count!r}, known are {', '.join(get_args(Count))}")
    runs: list[Run] = []
    for path in paths:
        if path.is_dir() and (sweep := read_sweep(path)) is not None:
            runs += read_folder_of_sweep(path, sweep, convention, count, complain)
        elif path.is_dir():
            runs += [read_folder(folder, convention or CONVENTION, count or COUNT) for folder in run_folders(path)]
        elif path.is_file():
            runs += read_csv(path, convention or CONVENTION)
        else:
            raise ValueError(f"no such file or folder: {path}")
    if not runs:
        raise ValueError("no runs were given")
    return with_budgets(runs)


def read_folder_of_sweep(
    path: Path, sweep: Mapping[str, Any], convention: Convention | None, count: Count | None, complain: Complain
) -> list[Run]:
    """The cells of a sweep that ended.

    Raises:
        ValueError: none of them did.
    """
    design, rows = Design.from_dict(sweep["design"]), outcomes(path)
    failed = [name for name in sweep["cells"] if "error" in rows.get(name, {})]
    missing = [name for name in sweep["cells"] if name not in rows]
    if failed or missing:
        parts = [f"{len(missing)} not run"] * bool(missing) + [f"{len(failed)} failed"] * bool(failed)
        complain(f"{path}: of {len(sweep['cells'])} cells {' and '.join(parts)}; nativerank scaling run --out {path}")
    known = [rows[name] for name in sweep["cells"] if name in rows and name not in failed]
    if not known:
        raise ValueError(f"no cell of {path} has ended; nativerank scaling run --out {path} goes on with it")
    if convention not in (None, design.convention):
        complain(f"{path}: its budgets are FLOPs by the convention {design.convention}, not {convention}")
    return [run_of(row, design, path, convention, count) for row in known]


def run_of(
    row: Mapping[str, Any],
    design: Design,
    path: Path,
    convention: Convention | None = None,
    count: Count | None = None,
) -> Run:
    """A row of results.jsonl as a run.

    Args:
        row: as `run_sweep` writes it. design: of its sweep, whose convention and count hold if none are given.
        path: of the sweep.
    """
    convention, own = convention or design.convention, count in (None, design.count)
    params = float(row["params"][count or design.count])
    flops = float(row["flops"][convention]) if own or convention == "exact" else 6 * params * row["tokens"]
    loss = float(row["val_loss"]) if "val_loss" in row else math.inf
    same_budget = own and convention == design.convention
    return Run(
        params=params,
        tokens=float(row["tokens"]),
        flops=flops,
        loss=loss if math.isfinite(loss) else math.inf,
        rank_ratio=row["rank_ratio"],
        method=row["method"],
        budget=row["budget"] if same_budget else None,
        source=f"{path}: {row['size']} at {row['budget']:.3g} FLOPs ({row['method']})",
        lr=row["lr"],
        seed=row["seed"],
        size=row["size"],
    )


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run, else every run below it.

    Raises:
        ValueError: there is none.
    """
    from nativerank.train.kept_config import CONFIG
    from nativerank.train.metrics import FILE

    found = sorted(file.parent for file in path.rglob(FILE) if (file.parent / CONFIG).is_file())
    if not found:
        raise ValueError(f"{path} holds no run: no folder with {CONFIG} and {FILE}")
    return found


def read_folder(folder: Path, convention: Convention = "6nd", count: Count = "non_embedding") -> Run:
    """What a run folder tells: parameters as they are at its end, the loss on the whole validation split.

    Raises:
        ValueError: the run has not ended.
    """
    from nativerank.train.kept_config import read_config
    from nativerank.train.metrics import read_rows

    config, rows = read_config(folder), read_rows(folder)
    ends = [row for row in rows if row.get("event") == "end"]
    stopped = [row for row in rows if row.get("action") == "stop"]
    if not ends and not stopped:
        raise ValueError(f"{folder} has not ended; go on with it by nativerank train --resume auto, or leave it out")
    row = (ends or stopped)[-1]
    known = [r["parameters"] for r in rows if "parameters" in r]
    if not known or "tokens" not in row:
        raise ValueError(f"{folder}: its metrics lack parameters or tokens")
    params, tokens = float(known[-1][count]), float(row["tokens"])
    loss = float(row["val_loss"]) if ends else math.inf
    flops = 6 * params * tokens if convention == "6nd" else float(row["train_flops"])
    ratio = config.rank.ratio if config.rank.value is None else share_of_width(config.rank.value, folder)
    loss = loss if math.isfinite(loss) else math.inf
    return Run(params, tokens, flops, loss, ratio, config.method or "", None, str(folder))


def share_of_width(rank: int, folder: Path) -> float | None:
    """The ratio that one rank for all matrices is, by the width of the model that a run left; None if it left none."""
    file = folder / "model" / "config.json"
    if not file.is_file():
        return None
    width = json.loads(file.read_text(encoding="utf-8")).get("hidden_size")
    return float(f"{rank / width:.4g}") if width else None
