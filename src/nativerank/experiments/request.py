"""A comparison as it was asked for, from the request to the files in its folder.

    OUT / request.json    what may not change when the same folder is used again
        / results.jsonl   one line per finished or failed cell        cells/HASH/   its run folder
        / compare.json    everything the table says, the curves and the cells
        / table.md

More arms, rates or seeds may join a folder: what has run is not run again.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nativerank.experiments.arms import Arm
from nativerank.experiments.compare import Comparison, Grid
from nativerank.experiments.expect import expected_seconds, rehearse
from nativerank.experiments.findings import Findings
from nativerank.experiments.search import Stage, tune
from nativerank.experiments.studies import Study, find_study
from nativerank.experiments.summary import summary
from nativerank.experiments.table import render

REQUEST, RECORD, TABLE = "request.json", "compare.json", "table.md"


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Args:
        folder: of the comparison.
        common: settings of every cell, by dotted key.
        arms, grid: the product grid; with `stages` the line search instead.
        study: a named study, which has its own arms.
        budget, seeds, jobs: as in `Comparison`.
    """

    folder: Path
    common: Mapping[str, Any]
    arms: Sequence[Arm] = ()
    grid: Grid = field(default_factory=dict)
    stages: Sequence[Stage] = ()
    study: str | None = None
    budget: str = "tokens"
    seeds: int = 3
    jobs: int = 1

    @property
    def fixed(self) -> dict[str, Any]:
        """What every use of the folder shares."""
        return {"study": self.study, "budget": self.budget, "common": dict(self.common)}

    def run(self, comparison: Comparison) -> None:
        """Enters the arms and runs them."""
        if self.study:
            find_study(self.study).run(comparison)
            return
        labels = comparison.enter(self.arms)
        if self.stages:
            tune(comparison, labels, self.stages)
        else:
            comparison.run_product(labels, self.grid)


def carry_out(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs what is missing and writes the files; returns the record.

    Raises:
        ValueError: an arm that cannot be, or a folder that holds something else.
    """
    check_folder(request)
    comparison = Comparison(request.folder, request.common, request.budget, request.seeds, request.jobs, say)
    new = not request.folder.exists()
    try:
        cells = rehearse(request.run, comparison)
    except BaseException:  # a study may have written model configs
        if new:
            shutil.rmtree(request.folder, ignore_errors=True)
        raise
    claim(request)
    say(expectation(request, len(cells), expected_seconds(cells, request.folder, request.jobs)))
    request.run(comparison)
    study = find_study(request.study) if request.study else None
    return write(request, comparison, study)


def expectation(request: Request, cells: int, seconds: float | None) -> str:
    """One line on what is about to run."""
    searched = bool(request.stages or request.study)
    time = "time known after the first" if seconds is None else f"about {max(1, round(seconds / 60))} min to go"
    more = "; a search that has to walk takes longer" if searched else ""
    return f"{cells} runs, {request.jobs} at a time: {time}{more}"


def check_folder(request: Request) -> None:
    """Raises a ValueError if the folder holds something else than an earlier use of this comparison."""
    folder = request.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; choose another --out")
    file = folder / REQUEST
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no comparison; choose another --out")
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    now = json.loads(json.dumps(request.fixed))
    changed = [key for key in ("study", "budget") if before[key] != now[key]]
    keys = sorted(before["common"].keys() | now["common"].keys())
    changed += [key for key in keys if before["common"].get(key) != now["common"].get(key)]
    if changed:
        raise ValueError(
            f"{folder} holds another comparison, which differs in {', '.join(changed)}; choose another --out"
        )


def claim(request: Request) -> None:
    """Makes the folder and writes what it is for."""
    request.folder.mkdir(parents=True, exist_ok=True)
    (request.folder / REQUEST).write_text(json.dumps(request.fixed, indent=1) + "\n", encoding="utf-8")


def write(request: Request, comparison: Comparison, study: Study | None) -> dict[str, Any]:
    """compare.json and table.md."""
    found = study.analyse(comparison) if study else Findings()
    title = study.what if study else f"{len(comparison.contenders)} arms at equal {request.budget}"
    record: dict[str, Any] = {"title": title, **summary(comparison), "common": dict(request.common)}
    if study:
        record["study"] = {"name": request.study, **vars(found)}
    for name, text in ((RECORD, json.dumps(record, indent=1) + "\n"), (TABLE, render(record, found.lines))):
        partial = request.folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(request.folder / name)
    return record
