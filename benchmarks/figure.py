"""Draws the figures of docs/ from the committed results: no run is needed.

    pip install -e '.[report]' && python benchmarks/figure.py

docs/rates.svg is validation loss against the matrix rate in the sweep: one line per method, at that method's best
auxiliary rate and init scale. Every benchmarks/results/compare-NAME.json, a comparison's compare.json, becomes
docs/compare-NAME-FIGURE.svg: of a study the figures that tell its story, of any other the curves and the rates.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from nativerank.report.plots import draw, draw_rates, rate_lines

ROOT = Path(__file__).parents[1]
TITLE = "preset pocket: 600 steps of 1,024 tokens, one seed"
STORIES = {
    "ablation": ("ablation",),
    "lr-robustness": ("robustness",),
    "update-norm": ("norms",),
    "equal-flops": ("curves",),
    "frames": (),  # its table says it better
    "adaptive-rank": (),
    "diloco": (),
}


def draw_comparison(file: Path, docs: Path) -> list[Path]:
    """The figures of one compare-NAME.json."""
    record = json.loads(file.read_text(encoding="utf-8"))
    wanted = STORIES.get(record.get("study", {}).get("name"), ("curves", "rates"))
    with TemporaryDirectory() as folder:
        drawn = {figure.stem: figure.read_bytes() for figure in draw(record, Path(folder))}
    made = []
    for name in wanted:
        if name in drawn:
            made.append(docs / f"{file.stem}-{name}.svg")
            made[-1].write_bytes(drawn[name])
    return made


def main(results: Path = ROOT / "benchmarks/results", docs: Path = ROOT / "docs") -> None:
    sweep = json.loads((results / "sweep-pocket.json").read_text(encoding="utf-8"))
    made = [draw_rates(rate_lines(sweep), docs / "rates.svg", TITLE)]
    for file in sorted(results.glob("compare-*.json")):
        made += draw_comparison(file, docs)
    print("\n".join(map(str, made)))


if __name__ == "__main__":
    main()
