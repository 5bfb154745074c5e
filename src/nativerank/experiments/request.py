"""A comparison as it was asked for, from the request to the files in its folder.

    OUT / request.json    what may not change when the same folder is used again
        / results.jsonl   one line per finished or failed cell        cells/HASH/   its run folder
        / compare.json    everything the table says, the curves and the cells
        / table.md

More arms, rates or seeds may join a folder: what has run is not run again.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nativerank.experiments.arms import COORDINATES, Arm
from nativerank.experiments.compare import Comparison, Grid
from nativerank.experiments.contender import Contender
from nativerank.experiments.expect import expected_seconds, rehearse
from nativerank.experiments.findings import Findings
from nativerank.experiments.grid import Cell
from nativerank.experiments.results import finished
from nativerank.experiments.search import Stage, tune
from nativerank.experiments.studies import CONFIGS, Study, find_study
from nativerank.experiments.summary import summary
from nativerank.experiments.table import count, render

REQUEST, RECORD, TABLE = "request.json", "compare.json", "table.md"
PARTIAL = ".partial"  # what a killed writer leaves


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
            comparison.check_product(labels, self.grid)
            comparison.run_product(labels, self.grid)


def carry_out(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs what is missing and writes the files; returns the record.

    Raises:
        ValueError: an arm that cannot be, or a folder that holds something else.
    """
    check_folder(request)
    comparison = Comparison(request.folder, request.common, request.budget, request.seeds, request.jobs, say)
    undo = undoing(request.folder)
    try:
        claim(request)  # before a study writes model configs, so that the folder is ours at any moment
        cells = rehearse(request.run, comparison)
    except BaseException:
        undo()
        raise
    say(expectation(request, cells))
    request.run(comparison)
    study = find_study(request.study) if request.study else None
    return write(request, comparison, study)


def plan(request: Request) -> list[str]:
    """What `carry_out` would run, in lines: how much, then every arm with its points. Leaves nothing behind.

    Raises:
        ValueError: as `carry_out`.
    """
    check_folder(request)
    undo = undoing(request.folder)
    try:
        comparison = Comparison(request.folder, request.common, request.budget, request.seeds, request.jobs)
        return planned(request, rehearse(request.run, comparison))
    finally:
        undo()


def planned(request: Request, cells: Sequence[tuple[Contender, Cell]]) -> list[str]:
    """The lines of a plan; a point that runs several seeds is named once."""
    by_arm: dict[str, Counter[str]] = {}
    for contender, cell in cells:
        values = dict(cell.settings)
        point = ", ".join(f"{key.partition('.')[2]} {values[key]:.4g}" for key in COORDINATES if key in values)
        by_arm.setdefault(contender.arm.label, Counter())[point] += 1
    lines = [expectation(request, cells), f"{count(len(by_arm), 'arm')}:"]
    for label, points in by_arm.items():
        lines.append(f"  {label}: {count(points.total(), 'run')}")
        lines += [f"    {point}{f' ({seeds} seeds)' if seeds > 1 else ''}" for point, seeds in points.items()]
    return lines


def undoing(folder: Path) -> Callable[[], None]:
    """What takes away the request and the model configs that the folder lacks now, or all of a folder to be made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made = missing[:1] or [folder / name for name in (REQUEST, CONFIGS) if not (folder / name).exists()]

    def undo() -> None:
        for path in made:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for parent in missing[1:]:
            with suppress(OSError):  # never made, or somebody else's by now
                parent.rmdir()

    return undo


def expectation(request: Request, cells: Sequence[tuple[Contender, Cell]]) -> str:
    """One line on what is about to run."""
    done = finished(request.folder)
    ready = sum(cell.name in done for _, cell in cells)
    runs = count(len(cells), "run")
    if ready == len(cells):
        return f"{runs}, all done"
    seconds = expected_seconds(cells, request.folder, request.jobs)
    time = "time known after the first" if seconds is None else f"about {max(1, round(seconds / 60))} min to go"
    more = "; a search that has to walk takes longer" if request.stages or request.study else ""
    return f"{runs}{f' ({ready} done)' if ready else ''}, {request.jobs} at a time: {time}{more}"


def check_folder(request: Request) -> None:
    """Raises a ValueError if the folder holds something else than an earlier use of this comparison."""
    folder = request.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; choose another --out")
    file = folder / REQUEST
    if not file.exists():
        if folder.exists() and any(not path.name.endswith(PARTIAL) for path in folder.iterdir()):
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
    put(request.folder / REQUEST, json.dumps(request.fixed, indent=1) + "\n")


def put(file: Path, text: str) -> None:
    """Writes a file that is complete or not there."""
    partial = file.with_name(f".{file.name}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def write(request: Request, comparison: Comparison, study: Study | None) -> dict[str, Any]:
    """compare.json and table.md."""
    found = study.analyse(comparison) if study else Findings()
    title = study.what if study else f"{count(len(comparison.contenders), 'arm')} at equal {request.budget}"
    record: dict[str, Any] = {"title": title, **summary(comparison), "common": dict(request.common)}
    if study:
        record["study"] = {"name": request.study, **vars(found)}
    put(request.folder / RECORD, json.dumps(record, indent=1) + "\n")
    put(request.folder / TABLE, render(record, found.lines))
    return record
