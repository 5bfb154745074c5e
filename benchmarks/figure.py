"""Draws docs/rates.svg from the committed sweep: validation loss against the matrix rate, one line per method.

    pip install matplotlib && python benchmarks/figure.py

Each line is the sweep's matrix rates at that method's best auxiliary rate and init scale.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
STYLES = {
    "spectron": ("#d1495b", "-", "o"),
    "lowrank-muon": ("#edae49", "-", "s"),
    "lowrank-adamw": ("#00798c", "-", "^"),
    "dense-muon": ("#8d8d8d", "--", "s"),
    "dense-adamw": ("#3b3b3b", "--", "^"),
}


def lines(sweep: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """(rate, loss) points of each method, other settings at their best."""
    found: dict[str, list[tuple[float, float]]] = {}
    for method, best in sweep["best"].items():
        others = {k: v for k, v in best.items() if k != "optim.lr"}
        rows = [
            c
            for c in sweep["cells"]
            if c["method"] == method and c["seed"] == 0 and all(c[k] == v for k, v in others.items())
        ]
        found[method] = sorted((c["optim.lr"], c["val_loss"]) for c in rows if "val_loss" in c)
    return found


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "nativerank", "font.size": 10, "axes.spines.top": False})
    sweep = json.loads((ROOT / "benchmarks/results/sweep-pocket.json").read_text())
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    for method, points in lines(sweep).items():
        color, dash, marker = STYLES[method]
        axes.plot(*zip(*points, strict=True), color=color, linestyle=dash, marker=marker, label=method)
    axes.set(xscale="log", xlabel="matrix learning rate", ylabel="validation loss (nats/token)")
    axes.spines["right"].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title("preset pocket: 600 steps of 1,024 tokens, one seed", loc="left", fontsize=10)
    figure.savefig(ROOT / "docs/rates.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
