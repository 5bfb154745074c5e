"""nativerank report: what runs, comparisons and sweeps did, as one HTML page that needs nothing else.

nativerank report runs/a                       # writes runs/a/report.html
nativerank report runs/a runs/b --out ab.html
nativerank report runs/sweep
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nativerank.cli.flags import add_quiet
from nativerank.cli.output import add_json, check_json, teller, write_json

DESCRIPTION = """One self-contained HTML page of runs (run folders, or folders of them), comparisons (of compare) and
sweeps (of scaling run): curves, spectra, ranks, cost, tables. It opens from disk, without a network."""
EXAMPLE = """examples:
  nativerank report runs/a                         # writes runs/a/report.html
  nativerank report runs/a runs/b --out ab.html    # over one another
  nativerank report runs/sweep                     # parabolas, laws, saving
"""
PAGE = "report.html"


def add_parser(subparsers: Any) -> None:
    """The flags."""
    import argparse

    parser = subparsers.add_parser(
        "report", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="RUN", help="run, comparison or sweep folders")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (without: {PAGE} in the folder, or here)")
    parser.add_argument("--title", default="", help="of the page")
    parser.add_argument("--no_plan", action="store_true", help="do not plan the run again to compare its cost")
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(flags: Any) -> int:
    """Reads, renders, writes."""
    check_json(flags.json)
    say, began = teller(flags), time.monotonic()
    out = flags.out or (
        flags.sources[0] / PAGE if len(flags.sources) == 1 and flags.sources[0].is_dir() else Path(PAGE)
    )
    check_target(out)
    from nativerank.cli.console import progress
    from nativerank.experiments.request import put
    from nativerank.report.page import render

    with progress(flags.quiet) as watch:
        sources = gather(flags.sources, not flags.no_plan, watch)
        watch("the page")
        text = render(sources, flags.title)
        put(out, text)
    size = len(text.encode())
    found = {
        "out": str(out),
        "bytes": size,
        "runs": [run.name for run in sources.runs],
        "comparisons": [name for name, _ in sources.comparisons],
        "sweeps": [sweep[0] for sweep in sources.sweeps],
        "seconds": time.monotonic() - began,
    }
    if not write_json(found, flags.json):
        say(f"{out}  ({size / 1e6:.1f} MB; open it in a browser)")
    return 0


def check_target(out: Path) -> None:
    """Raises a ValueError if the page could not be written there."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file, such as {out / PAGE}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")


def gather(names: list[Path], plan: bool, watch: Any) -> Any:
    """Everything that was named, read.

    Raises:
        ValueError: something is neither run nor comparison nor sweep, or cannot be read.
    """
    from nativerank.report.page import Sources
    from nativerank.report.runs import read_run

    sources = Sources()
    folders: list[Path] = []
    for path in names:
        for kind, found in kinds(path):
            if kind == "run":
                folders += [found] if found not in folders else []
            elif kind == "comparison":
                record = read_record(found, ("arms", "cells", "curves", "title"))
                sources.comparisons.append((path.resolve().name, record))
            else:
                sources.sweeps.append(read_sweep(path, found))
    for number, (folder, name) in enumerate(zip(folders, shown_names(folders), strict=True)):
        watch(f"{folder}", number, len(folders))
        sources.runs.append(read_run(folder, name))
    if plan and len(sources.runs) == 1:
        watch("the plan of the run")
        sources.planned[sources.runs[0].name] = planned(sources.runs[0].folder)
    return sources


def kinds(path: Path) -> Iterator[tuple[str, Path]]:
    """(kind, file or folder) of what a path holds."""
    from nativerank.train.metrics import FILE

    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        record = read_record(path, ())
        if "arms" in record and "cells" in record:
            yield "comparison", path
        elif "groups" in record and "surface" in record:
            yield "sweep", path
        else:
            raise ValueError(f"{path} holds neither a comparison (compare.json) nor a fit (fit.json)")
        return
    if (path / FILE).is_file():
        yield "run", path
    elif (path / "compare.json").is_file():
        yield "comparison", path / "compare.json"
    elif (path / "sweep.json").is_file() or (path / "fit.json").is_file():
        yield "sweep", path / "fit.json"
    else:
        below = sorted(child for child in path.iterdir() if (child / FILE).is_file())
        if not below:
            raise ValueError(f"{path} holds no run ({FILE}), no comparison (compare.json) and no sweep (sweep.json)")
        yield from (("run", child) for child in below)


def shown_names(folders: list[Path]) -> list[str]:
    """The folders' own names, with as many parents as tell them apart."""
    for depth in range(1, 10):
        names = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read_record(file: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none, or lacks a key.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    missing = [key for key in needed if not isinstance(record, dict) or key not in record]
    if not isinstance(record, dict) or missing:
        raise ValueError(f"{file} is no record of a comparison: it lacks {', '.join(missing) or 'everything'}")
    return record


def read_sweep(path: Path, fit: Path) -> tuple[str, Any, Any, list[dict[str, Any]]]:
    """(name, fit, decision, rows of the cells) of a sweep."""
    from nativerank.experiments.results import outcomes
    from nativerank.scaling.decide import decide

    found = decided = None
    if fit.is_file():
        from nativerank.cli.scaling_report import read_one

        found = read_one(str(fit))
        decided = decide(found)
    cells = list(outcomes(path).values()) if path.is_dir() else []
    return path.resolve().name if path.is_dir() else path.stem, found, decided, cells


def planned(folder: Path) -> dict[str, Any] | str:
    """What the run's configuration was to cost, or why nobody can tell here."""
    from nativerank.plan.make import Request, make_plan
    from nativerank.train.kept_config import read_config

    try:
        return make_plan(read_config(folder), Request(search=False))
    except (ValueError, OSError, ImportError) as error:
        return " ".join(str(error).split())
