"""Draws docs/rates.svg from the committed sweep: validation loss against the matrix rate, one line per method.

    pip install -e '.[report]' && python benchmarks/figure.py

Each line is the sweep's matrix rates at that method's best auxiliary rate and init scale.
"""

import json
from pathlib import Path

from nativerank.report.plots import draw_rates, rate_lines

ROOT = Path(__file__).parents[1]
TITLE = "preset pocket: 600 steps of 1,024 tokens, one seed"


def main() -> None:
    sweep = json.loads((ROOT / "benchmarks/results/sweep-pocket.json").read_text())
    draw_rates(rate_lines(sweep), ROOT / "docs/rates.svg", TITLE)


if __name__ == "__main__":
    main()
