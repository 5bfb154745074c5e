"""Does a teacher help after conversion? A dense model, its factors, and how fast what was lost comes back.

    python benchmarks/distill.py [--out FOLDER] [--json FILE]

A dense pocket model is trained (dense-muon, 600 steps at its tuned rates), converted at RANK, and trained on by
spectron for STEPS steps of 1024 tokens: on the text alone, and with the dense model as teacher. With the first seed
each way gets the rates that are best for it, shares of the tuned rates of a fresh start (a best share at the end of
the grid extends it), and the best weight and temperature are chosen; the other seeds repeat that way and the text
alone. Seeds decide the order of the data, which is the same for all ways of a seed. A teacher's forward pass costs
FLOPs too, so there are also longer runs on the text alone that spend as many. Runs that are complete in FOLDER are
not made again.
"""

import argparse
import json
import platform
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from nativerank.config import RankConfig, RunConfig, from_dict
from nativerank.convert import convert
from nativerank.methods import default_rates
from nativerank.train.listen import Silence
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows
from nativerank.version import __version__

SEEDS, RANK, STEPS, TEACHER_STEPS = (0, 1, 2), 16, 100, 600
METHOD, EVERY = "spectron", 25
SHARES = (0.5, 1.0, 2.0)  # of the tuned rates; extended where the best lies at an end
WAYS: dict[str, dict[str, float]] = {
    "text alone": {},
    "weight 0.5, T 1": {"weight": 0.5, "temperature": 1.0},
    "weight 1, T 1": {"weight": 1.0, "temperature": 1.0},
    "weight 1, T 2": {"weight": 1.0, "temperature": 2.0},
}


def run(out: Path, **keys: Any) -> list[dict[str, Any]]:
    """The rows of a run on one thread, made if it is not complete."""
    if not (out / "model").is_dir():
        common = {"device": "cpu", "out": str(out), "resume": "auto"}
        train(from_dict(RunConfig, {**common, **keys}), Silence())
    return read_rows(out)


def teacher(folder: Path) -> dict[str, float]:
    """Trains the dense model and converts it; the losses before and after, on the whole validation split."""
    once = {"steps": TEACHER_STEPS, "eval_every": 0, "checkpoint_every": 0, "probe_every": 0}
    rows = run(folder / "dense", method="dense-muon", model={"preset": "pocket-dense"}, train=once)
    factored, file = folder / "factored", folder / "factored.json"
    if not factored.exists():
        from nativerank.data.demo import prepared_demo

        data = prepared_demo(1024, quiet=True)
        done = convert(folder / "dense", factored, RankConfig(value=RANK), data=data, eval_tokens=None)
        assert done.before and done.after
        file.write_text(json.dumps({"dense": done.before.nats, "converted": done.after.nats}))
    losses: dict[str, float] = json.loads(file.read_text())
    assert abs(losses["dense"] - rows[-1]["val_loss"]) < 1e-3
    return losses


def train_on(folder: Path, way: str, share: float, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """One continuation: its curve of validation losses, and the loss on the whole split at the end."""
    rates, distill = default_rates(METHOD, "pocket"), WAYS[way]
    if distill:
        distill = {**distill, "teacher": str(folder / "dense")}
    name = f"{way}-{share}-{seed}".replace(", ", "-").replace(" ", "-") + (f"-{steps}" if steps != STEPS else "")
    rows = run(
        folder / name,
        method=METHOD,
        init=str(folder / "factored"),
        model={"preset": "pocket"},
        optim={"lr": rates.lr * share, "aux_lr": rates.aux_lr * share},
        train={"steps": steps, "seed": seed, "eval_every": EVERY, "eval_tokens": 16384, "checkpoint_every": 0}
        | {"probe_every": 0},
        distill=distill,
    )
    curve = {row["tokens"]: round(row["val_loss"], 4) for row in rows if "loss" in row and "val_loss" in row}
    end = rows[-1]
    return {"way": way, "share": share, "seed": seed, "curve": curve, "steps": steps} | {
        "val_loss": round(end["val_loss"], 4),
        "train_flops": end["train_flops"],
    }


def search(folder: Path, way: str) -> list[dict[str, Any]]:
    """The cells of the first seed, over shares until the best one has worse neighbours."""
    cells = {share: train_on(folder, way, share, SEEDS[0]) for share in SHARES}
    while True:
        best, low, high = min(cells, key=lambda s: cells[s]["val_loss"]), min(cells), max(cells)
        if best not in (low, high) or len(cells) > 2 * len(SHARES):
            return [cells[share] for share in sorted(cells)]
        further = low / 2 if best == low else high * 2
        cells[further] = train_on(folder, way, further, SEEDS[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/distill-pocket.json"))
    arguments = parser.parse_args()
    folder: Path = arguments.out
    start = teacher(folder)
    cells = [cell for way in WAYS for cell in search(folder, way)]
    best = {way: min((c for c in cells if c["way"] == way), key=lambda c: c["val_loss"]) for way in WAYS}
    taught = min((way for way in WAYS if WAYS[way]), key=lambda way: best[way]["val_loss"])
    repeated = {"text alone": STEPS, taught: STEPS}
    cells += [train_on(folder, way, best[way]["share"], seed) for seed in SEEDS[1:] for way in repeated]
    longer = round(STEPS * best[taught]["train_flops"] / best["text alone"]["train_flops"])
    cells += [train_on(folder, "text alone", best["text alone"]["share"], seed, longer) for seed in SEEDS]
    table = {}
    for way, steps in [*repeated.items(), ("text alone", longer)]:
        share = best[way]["share"]
        losses = [c["val_loss"] for c in cells if (c["way"], c["share"], c["steps"]) == (way, share, steps)]
        row = {"share": share, "steps": steps, "val_loss": losses, "mean": mean(losses), "stdev": stdev(losses)}
        table[f"{way}, {steps} steps"] = row
        print(f"{way}, {steps} steps, share {share:g}: {row['mean']:.4f} +- {row['stdev']:.4f}  {losses}")
    what = {"script": "benchmarks/distill.py", "version": __version__, "machine": f"{platform.machine()}, one thread"}
    what |= {"rank": RANK, "method": METHOD, "start": start}
    arguments.json.write_text(json.dumps({**what, "table": table, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
