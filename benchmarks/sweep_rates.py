"""Finds the default rates of a preset: matrix rate, auxiliary rate and init scale, for every method alike.

    python benchmarks/sweep_rates.py pocket --jobs 2                           # about 40 minutes on two cores
    python benchmarks/sweep_rates.py demo --jobs 2 --stages 1 --steps 320      # about 40 minutes

Coordinate search, per method: the matrix rate over a grid of factor 1.6, then the auxiliary rate at the best of it,
then the init scale, then the matrix rate's neighbours twice more. Starts where earlier experiments pointed; the demo
preset starts from the best of pocket. One seed; single-seed differences below 0.02 nats are noise. Writes
benchmarks/results/sweep-PRESET.json; its best rows stand in `SWEPT` of src/nativerank/methods.py, and a test compares
the two.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from nativerank.experiments.grid import Cell, run_grid
from nativerank.version import __version__

RESULTS = Path(__file__).parent / "results"
START = {
    "spectron": (0.05, 0.02, 0.577),
    "lowrank-muon": (0.01, 0.02, 0.577),
    "lowrank-adamw": (0.003, 0.02, 0.577),
    "dense-muon": (0.014, 0.02, 0.25),
    "dense-adamw": (0.003, 0.02, 0.25),
}
FACTOR = 1.6
KEYS = ("optim.lr", "optim.aux_lr", "model.init_scale")
STAGES = (  # which coordinate, times what
    ("optim.lr", (1 / FACTOR, 1, FACTOR)),
    ("optim.aux_lr", (0.5, 1)),
    ("model.init_scale", (0.5, 1, 2)),
    ("optim.lr", (1 / FACTOR, 1, FACTOR)),
    ("optim.lr", (1 / FACTOR, 1, FACTOR)),  # for a best rate that was at the edge of its grid
)


def cell(fixed: dict[str, Any], method: str, point: dict[str, float]) -> Cell:
    """One run with no validation on the way."""
    fixed = {**fixed, "method": method, "train.eval_every": 0, "train.checkpoint_every": 0}
    return Cell(tuple(sorted({**fixed, **point}.items())))


def stage(
    folder: Path, fixed: dict[str, Any], best: dict[str, dict[str, float]], key: str, factors: tuple, jobs: int
) -> None:
    """Moves every method's best point along one coordinate, in place."""
    points = {m: [{**p, key: float(f"{p[key] * f:.3g}")} for f in factors] for m, p in best.items()}
    cells = [cell(fixed, m, p) for m, ps in points.items() for p in ps]
    losses = {row["cell"]: row.get("val_loss", float("inf")) for row in run_grid(cells, folder, jobs)}
    for m, ps in points.items():
        best[m] = min(ps, key=lambda p: losses[cell(fixed, m, p).name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=["pocket", "demo"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--methods", default=",".join(START))
    parser.add_argument("--stages", type=int, default=len(STAGES), help="fewer for a coarser, shorter search")
    parser.add_argument("--steps", type=int, help="length of every run (default: the preset's)")
    parser.add_argument("--out", type=Path, help="grid folder (default runs/sweep-PRESET)")
    args = parser.parse_args()
    folder = args.out or Path("runs") / f"sweep-{args.preset}"
    start = START if args.preset == "pocket" else best_of("pocket")
    best: dict[str, dict[str, float]] = {m: dict(zip(KEYS, start[m], strict=True)) for m in args.methods.split(",")}
    fixed = {"model.preset": args.preset} | ({"train.steps": args.steps} if args.steps else {})
    for key, factors in STAGES[: args.stages]:
        stage(folder, fixed, best, key, factors, args.jobs)
    write(args.preset, folder, best)


def best_of(preset: str) -> dict[str, tuple[float, float, float]]:
    """The committed best points of another preset's sweep."""
    best = json.loads((RESULTS / f"sweep-{preset}.json").read_text())["best"]
    return {method: tuple(point[key] for key in KEYS) for method, point in best.items()}


def write(preset: str, folder: Path, best: dict[str, dict[str, float]]) -> None:
    """Every cell that was run, and each method's best."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {
        "script": f"benchmarks/sweep_rates.py {preset}",
        "version": __version__,
        "machine": f"{platform.machine()} {platform.processor()}, two cores, one thread per run",
        "seeds": 1,
        "best": best,
        "cells": [
            {k: row["settings"][k] for k in ("method", *KEYS)}
            | (
                {"error": row["error"]}
                if "error" in row
                else {"val_loss": round(row["val_loss"], 4), "step": row["step"]}
            )
            for row in rows
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"sweep-{preset}.json").write_text(json.dumps(result, indent=1) + "\n")
    for method, point in best.items():
        print(method, point)


if __name__ == "__main__":
    main()
