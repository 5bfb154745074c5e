"""One trained model of a sweep as five numbers, read from a CSV or from run folders, checked before anything is
fitted.

    params, tokens, flops, loss [, rank_ratio, method, budget]

params N, tokens D, FLOPs C of training, loss in nats per token of held-out text. A budget holds the runs whose FLOPs
agree up to a factor of BUDGET_GAP between neighbours, unless a column says otherwise. FLOPs are counted by one of two
conventions, which must be named: "6nd" is 6 N D with the N of the table, "exact" is rank-aware, attention and head
included (`accounting.flops`), so that C / (N D) differs from model to model. A loss of "inf" or "diverged" is a run
that was tried and has no loss; NaN and empty cells are errors.
"""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

Convention = Literal["6nd", "exact"]
Count = Literal["non_embedding", "total"]

REQUIRED = ("params", "tokens", "flops", "loss")
OPTIONAL = ("rank_ratio", "method", "budget")
BUDGET_GAP = 1.3
BUDGET_ERROR = 2.0  # largest factor between a run's FLOPs and those of the budget that it is said to belong to
# Largest factor between flops and 6 N D that is no mistake. "exact" counts heads and attention, which are most of a
# tiny model, and no embedding: what it has to catch are millions for ones.
TOLERANCE: dict[str, float] = {"6nd": 1.3, "exact": 100.0}
DIVERGED = "diverged"


@dataclass(frozen=True)
class Run:
    """One cell of a sweep.

    Attributes:
        params, tokens, flops: N, D and C of the whole run.
        loss: nats per token; inf for a run that diverged.
        rank_ratio: r / d_in; None where matrices are dense or ranks follow another rule.
        method: as it was named; "" if it was not.
        budget: FLOPs that its cell stands for; `with_budgets` fills it in.
        source: where it was read, for messages.
    """

    params: float
    tokens: float
    flops: float
    loss: float
    rank_ratio: float | None = None
    method: str = ""
    budget: float | None = None
    source: str = ""

    @property
    def group(self) -> str:
        """Runs that one law describes: "spectron rho=0.25"; "all" where nothing sets runs apart."""
        ratio = "" if self.rank_ratio is None else f"rho={self.rank_ratio:g}"
        return " ".join(filter(None, (self.method, ratio))) or "all"


def read_runs(paths: Iterable[Path], convention: Convention = "6nd", count: Count = "non_embedding") -> list[Run]:
    """The runs of CSV files, run folders and folders that hold run folders, with their budgets.

    Args:
        paths: files and folders. convention: of the FLOPs. count: which N run folders give; a CSV has one.

    Raises:
        ValueError: nothing there, or anything wrong with it, named by row and column.
    """
    if convention not in get_args(Convention):
        raise ValueError(f"unknown FLOPs convention {convention!r}, known are {', '.join(get_args(Convention))}")
    runs: list[Run] = []
    for path in paths:
        if path.is_dir():
            runs += [read_folder(folder, convention, count) for folder in run_folders(path)]
        elif path.is_file():
            runs += read_csv(path, convention)
        else:
            raise ValueError(f"no such file or folder: {path}")
    if not runs:
        raise ValueError("no runs were given")
    return with_budgets(runs)


def read_csv(path: Path, convention: Convention = "6nd") -> list[Run]:
    """The runs of a table; rows are counted as a spreadsheet does, the header being row 1.

    Raises:
        ValueError: a column is missing, a cell is empty, no number or not positive, or units contradict each other.
    """
    with path.open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream, skipinitialspace=True)
        try:
            names = [name.strip() for name in table.fieldnames or []]
            check_columns(names, path)
            table.fieldnames = names
            runs = [as_run(row, f"{path}, row {table.line_num}", convention) for row in table]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is no CSV file: {error}") from None
    if not runs:
        raise ValueError(f"{path} holds no runs below its header")
    return runs


def check_columns(names: Sequence[str], path: Path) -> None:
    """Raises a ValueError for a column that is missing, or is there twice."""
    for name in REQUIRED:
        if name not in names:
            raise ValueError(f"{path}, row 1: no column {name}; it has {', '.join(names) or 'none'}")
    for name in (*REQUIRED, *OPTIONAL):
        if names.count(name) > 1:
            raise ValueError(f"{path}, row 1: column {name} is there {names.count(name)} times")


def as_run(row: dict[str, Any], where: str, convention: Convention) -> Run:
    """A row of a table; `where` names it in messages."""
    if None in row:
        raise ValueError(f"{where}: it has more cells than the header")
    texts = {name: (row.get(name) or "").strip() for name in (*REQUIRED, *OPTIONAL)}
    diverged = texts["loss"].lower() in (DIVERGED, "inf", "+inf", "infinity")
    loss = math.inf if diverged else positive(texts["loss"], where, "loss")
    params, tokens, flops = (positive(texts[name], where, name) for name in ("params", "tokens", "flops"))
    ratio, budget = (positive(texts[n], where, n) if texts[n] else None for n in ("rank_ratio", "budget"))
    check_units(params, tokens, flops, where, convention)
    if budget and not 1 / BUDGET_ERROR <= flops / budget <= BUDGET_ERROR:
        raise ValueError(f"{where}, column budget: {budget:.3g} is not what flops says, {flops:.3g}")
    return Run(params, tokens, flops, loss, ratio, texts["method"], budget, where)


def positive(text: str, where: str, column: str) -> float:
    """The number in a cell."""
    if not text:
        raise ValueError(f"{where}, column {column}: the cell is empty")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where}, column {column}: {text!r} is no number") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{where}, column {column}: {text} is not a finite number above 0")
    return value


def check_units(params: float, tokens: float, flops: float, where: str, convention: Convention) -> None:
    """Raises a ValueError if FLOPs cannot be those of this model on these tokens."""
    expected = 6 * params * tokens
    ratio, most = flops / expected, TOLERANCE[convention]
    if max(ratio, 1 / ratio) <= most:
        return
    thousands = round(math.log10(ratio) / 3)
    hint = ""
    if thousands and abs(math.log10(ratio) - 3 * thousands) < math.log10(2):
        hint = f", a factor of 1e{3 * thousands}: are all of them in ones?"
    elif convention == "6nd":
        hint = "; if they count attention and head too, the convention is exact"
    raise ValueError(f"{where}, column flops: {flops:.3g} contradicts 6 params tokens = {expected:.3g}{hint}")


def with_budgets(runs: Sequence[Run]) -> list[Run]:
    """The same runs, each with a budget: its own, or the geometric mean of its neighbours in FLOPs."""
    open_ones = [i for i, run in enumerate(runs) if run.budget is None]
    if not open_ones:
        return list(runs)
    logs = np.log([runs[i].flops for i in open_ones])
    order = np.argsort(logs, kind="stable")
    cluster = np.concatenate([[0], np.cumsum(np.diff(logs[order]) > math.log(BUDGET_GAP))])
    out = list(runs)
    for number in range(cluster[-1] + 1):
        members = order[cluster == number]
        budget = float(np.exp(logs[members].mean()))
        for member in members:
            out[open_ones[member]] = replace(runs[open_ones[member]], budget=budget)
    return out


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run, else every run below it.

    Raises:
        ValueError: there is none.
    """
    from nativerank.train.folder import CONFIG
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
    from nativerank.train.folder import read_config
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
