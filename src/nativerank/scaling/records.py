"""One trained model of a sweep as a few numbers; tables of them, checked before anything is fitted.

    params, tokens, flops, loss [, rank_ratio, method, budget, lr, seed, size]

params N, tokens D, FLOPs C of training, loss in nats per token of held-out text. A budget holds the runs whose FLOPs
agree up to a factor of BUDGET_GAP between neighbours, unless a column says otherwise. FLOPs are counted by one of two
conventions, which must be named: "6nd" is 6 N D with the N of the table, "exact" is rank-aware, attention and head
included (`accounting.flops`), so that C / (N D) differs from model to model. A loss of "inf" or "diverged" is a run
that was tried and has no loss; NaN and empty cells are errors. Other columns are ignored.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

Convention = Literal["6nd", "exact"]
Count = Literal["non_embedding", "total"]

REQUIRED = ("params", "tokens", "flops", "loss")
OPTIONAL = ("rank_ratio", "method", "budget", "lr", "seed", "size")
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
        lr: rate of the matrices, where a cell ran with several. seed: of a replicate. size: name of the model.
    """

    params: float
    tokens: float
    flops: float
    loss: float
    rank_ratio: float | None = None
    method: str = ""
    budget: float | None = None
    source: str = ""
    lr: float | None = None
    seed: int | None = None
    size: str = ""

    @property
    def group(self) -> str:
        """Runs that one law describes: "spectron rho=0.25"; "all" where nothing sets runs apart."""
        ratio = "" if self.rank_ratio is None else f"rho={self.rank_ratio:g}"
        return " ".join(filter(None, (self.method, ratio))) or "all"


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


def write_csv(runs: Sequence[Run], file: Path) -> None:
    """Writes a table that `read_csv` reads back."""
    columns = (*REQUIRED, *OPTIONAL)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        for run in runs:
            values = {name: getattr(run, name) for name in columns}
            if run.loss == math.inf:
                values["loss"] = DIVERGED
            writer.writerow(["" if v is None else f"{v:.17g}" if isinstance(v, float) else v for v in values.values()])


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
    lr = positive(texts["lr"], where, "lr") if texts["lr"] else None
    seed = int(texts["seed"]) if texts["seed"].isdecimal() else None
    if texts["seed"] and seed is None:
        raise ValueError(f"{where}, column seed: {texts['seed']!r} is no whole number")
    return Run(params, tokens, flops, loss, ratio, texts["method"], budget, where, lr, seed, texts["size"])


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
