"""Finds the default rates of a preset: matrix rate, auxiliary rate and init scale, for every method alike.

    python benchmarks/sweep_rates.py pocket --jobs 2                           # about 40 minutes on two cores
    python benchmarks/sweep_rates.py demo --jobs 2 --stages 1 --steps 200 --seeds 1 \
        --methods spectron,lowrank-muon,lowrank-adamw

Per method a line search along one coordinate after the other: matrix rate (factor 1.6), auxiliary rate (2), init
scale (2), matrix rate again. A line search tries both neighbours of the best value until the best has both. It starts
where earlier experiments pointed; the demo preset starts from the best of pocket. The search runs one seed (there
differences below 0.02 nats are noise), the best points run --seeds. Writes benchmarks/results/sweep-PRESET.json; its
best points stand in `SWEPT` of src/nativerank/methods.py, and a test compares the two.
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
KEYS = ("optim.lr", "optim.aux_lr", "model.init_scale")
STAGES = (("optim.lr", 1.6), ("optim.aux_lr", 2.0), ("model.init_scale", 2.0), ("optim.lr", 1.6))  # coordinate, factor
Points = dict[str, dict[str, float]]


def cell(fixed: dict[str, Any], method: str, point: dict[str, float]) -> Cell:
    """One run with no validation on the way."""
    fixed = {**fixed, "method": method, "train.eval_every": 0, "train.checkpoint_every": 0}
    return Cell(tuple(sorted({**fixed, **point}.items())))


def line_search(folder: Path, fixed: dict[str, Any], best: Points, key: str, factor: float, jobs: int) -> None:
    """Moves every method's best point along one coordinate, in place."""
    losses: dict[Cell, float] = {}

    def neighbours(method: str) -> list[Cell]:
        values = [best[method][key] * f for f in (1, 1 / factor, factor)]
        return [cell(fixed, method, {**best[method], key: float(f"{value:.3g}")}) for value in values]

    while missing := [c for method in best for c in neighbours(method) if c not in losses]:
        rows = run_grid(missing, folder, jobs)
        losses |= {c: row.get("val_loss", float("inf")) for c, row in zip(missing, rows, strict=True)}
        for method in best:
            best[method][key] = dict(min(neighbours(method), key=losses.__getitem__).settings)[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=["pocket", "demo"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--methods", default=",".join(START))
    parser.add_argument("--stages", type=int, default=len(STAGES), help="fewer for a coarser, shorter search")
    parser.add_argument("--steps", type=int, help="length of every run (default: the preset's)")
    parser.add_argument("--seeds", type=int, default=3, help="runs at each method's best point")
    parser.add_argument("--out", type=Path, help="grid folder (default runs/sweep-PRESET)")
    args = parser.parse_args()
    folder = args.out or Path("runs") / f"sweep-{args.preset}"
    start = START if args.preset == "pocket" else best_of("pocket")
    best: Points = {m: dict(zip(KEYS, start[m], strict=True)) for m in args.methods.split(",")}
    fixed = {"model.preset": args.preset} | ({"train.steps": args.steps} if args.steps else {})
    for key, factor in STAGES[: args.stages]:
        line_search(folder, fixed, best, key, factor, args.jobs)
    seeded = {
        m: [cell({**fixed, **({"train.seed": s} if s else {})}, m, p) for s in range(args.seeds)]
        for m, p in best.items()
    }
    rows = {row["cell"]: row for row in run_grid([c for cells in seeded.values() for c in cells], folder, args.jobs)}
    at_best = {m: [rows[c.name].get("val_loss") for c in cells] for m, cells in seeded.items()}
    write(args.preset, folder, best, at_best)


def best_of(preset: str) -> dict[str, tuple[float, float, float]]:
    """The committed best points of another preset's sweep."""
    best = json.loads((RESULTS / f"sweep-{preset}.json").read_text())["best"]
    return {method: tuple(point[key] for key in KEYS) for method, point in best.items()}


def write(preset: str, folder: Path, best: Points, at_best: dict[str, list[float | None]]) -> None:
    """Every cell's last result, each method's best point, and the losses of the seeds there."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    rows = list({row["cell"]: row for row in map(json.loads, lines)}.values())
    result: dict[str, Any] = {
        "script": f"benchmarks/sweep_rates.py {preset}",
        "version": __version__,
        "machine": f"{platform.machine()} {platform.processor()}, two cores, one thread per run",
        "best": best,
        "val_loss_at_best_by_seed": at_best,
        "cells": [
            {k: row["settings"][k] for k in ("method", *KEYS)}
            | {"seed": row["settings"].get("train.seed", 0)}
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
