"""nativerank scaling run: trains the cells of a sweep, and goes on where it stopped.

nativerank scaling run --grid miniature --jobs 2 --out runs/sweep
nativerank scaling run --out runs/sweep                            # go on, with what the folder says
nativerank scaling run --out runs/sweep --cell 7                   # one of them, as a task of a job array
"""

import sys
from typing import Any

from nativerank.cli.compare import terminated_like_interrupted, whole
from nativerank.cli.output import check_json, teller, write_json
from nativerank.cli.scaling_design import design_parser, number, read_design
from nativerank.cli.scaling_plan import stored

DESCRIPTION = """Every cell of a sweep is an ordinary run of train with a schedule of its own length. Calling it again
goes on: what has run is not run again, what failed is tried again, and new sizes or budgets may join."""
EXAMPLE = """examples:
  nativerank scaling run --grid miniature --jobs 2 --out runs/sweep
  nativerank scaling run --out runs/sweep --minutes 9
  nativerank scaling run --family pocket --widths 64,96,128 --budgets 1e12,3e12 --methods spectron --out runs/mine
  nativerank scaling run --grid desk --data.path data --out runs/desk --ray 4,1
  sbatch --array=0-32 launch/slurm-array.sbatch --grid miniature --out /shared/runs/sweep

Then: nativerank scaling fit runs/sweep
"""


def add_flags(parser: Any) -> None:
    """What a sweep that runs takes besides its design."""
    group = parser.add_argument_group("run")
    group.add_argument("--jobs", metavar="K", help="runs side by side, the threads divided among them (without: 1)")
    group.add_argument("--minutes", metavar="M", help="stop after this time; the runs that are not done are saved")
    group.add_argument("--ray", metavar="CPU[,GPU]", help="runs as trials of Ray Tune, each with these resources")
    group.add_argument("--cell", metavar="I", help="only this cell, numbered from 0 as scaling plan --json does")


def parse(argv: list[str]) -> tuple[Any, Any, Any]:
    """(design, flags, --out), as `read_design`."""
    return read_design(argv, design_parser("run", DESCRIPTION, EXAMPLE, "[--grid NAME] --out DIR ", add_flags))


def run(argv: list[str]) -> int:
    """Runs and shows."""
    design, flags, out = parse(argv)
    check_json(flags.json)
    if out is None:
        raise ValueError("scaling run needs --out DIR, the folder of the sweep")
    jobs, minutes, only = whole("jobs", flags.jobs, 1), positive_minutes(flags.minutes), cell_number(flags.cell)
    trials = None if flags.ray is None else resources(flags.ray)
    if only is not None and jobs > 1:
        raise ValueError("--cell is one run, so --jobs has no meaning")
    if trials and (only is not None or minutes is not None or flags.jobs is not None):
        raise ValueError("--ray decides what runs where and when, so --cell, --jobs and --minutes have no meaning")
    design = stored(out) if design is None else design
    from nativerank.scaling.cells import plan_cells
    from nativerank.scaling.run import run_sweep

    say = teller(flags)
    try:
        with terminated_like_interrupted():
            record = run_sweep(design, plan_cells(design), out, jobs, say, only, minutes, trials)
    except (KeyboardInterrupt, SystemExit):
        print("nativerank: the runs are saved; the same command goes on from there", file=sys.stderr)
        raise
    write_json(record, flags.json)
    for line in ending(record, out):
        say(line)
    return failed(record)


def positive_minutes(text: str | None) -> float | None:
    """The value of --minutes."""
    value = None if text is None else number("minutes", text)
    if value is not None and value <= 0:
        raise ValueError(f"--minutes must be positive, got {text}")
    return value


def resources(text: str) -> dict[str, float]:
    """The value of --ray."""
    parts = [number("ray", word) for word in text.split(",")]
    if len(parts) > 2 or min(parts) < 0 or parts[0] == 0:
        raise ValueError(f"--ray takes CPU or CPU,GPU of each run, got {text}")
    return dict(zip(("cpu", "gpu"), parts, strict=False))


def cell_number(text: str | None) -> int | None:
    """The value of --cell."""
    if text is not None and not text.isdecimal():
        raise ValueError(f"--cell must be a whole number from 0 on, got {text}")
    return None if text is None else int(text)


def ending(record: dict[str, Any], out: Any) -> list[str]:
    """What to do next."""
    lines = [f"{record['done']} of {record['planned']} runs done"]
    if record["failed"]:
        lines[0] += f", {record['failed']} failed"
    if record["left"] or record["failed"]:
        lines.append(f"to go on: nativerank scaling run --out {out}")
    if record["done"]:
        lines.append(f"fit: nativerank scaling fit {out}")
    return lines


def failed(record: dict[str, Any]) -> int:
    """Exit code: 1 if a cell failed, after its reason; a divergence is a result."""
    errors = [row for row in record["cells"] if "error" in row]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        print(f"nativerank: error: {errors[0]['size']} failed: {errors[0]['error']}{more}", file=sys.stderr)
    return 1 if errors else 0
