"""The goals for a GPU, judged by what the slices of benchmarks/gpu.py found.

    train-P        spectron at spectron-l at most 0.80 of the dense twin's time per token (aim 0.70); from spectron-m up
                   no slower than it
    optimizer-P    the whole optimizer below 1% of a step of 512k tokens and below 5% at 32k, in the form of the paper
    retraction     of the 70B stack in less than 20 ms

Figures that no goal was set for are reported.
"""

from typing import Any

PRESETS = ("spectron-s", "spectron-m", "spectron-l")
Case = dict[str, Any]


def goals(found: dict[str, Case]) -> list[Case]:
    """Every goal that these slices speak of: what it says, the figure, its bound, and by how much it is missed.

    Args:
        found: cases of the record by the name of their slice.

    Returns:
        Rows {"goal", "figure", "bound", "met", "missed"}; bound and met are None where no goal was set.
    """
    rows: list[Case] = []

    def goal(text: str, figure: float, bound: float | None, below: bool = True) -> None:
        if bound is None:
            rows.append({"goal": text, "figure": figure, "bound": None, "met": None, "missed": ""})
            return
        met = figure < bound if below else figure <= bound
        by = "" if met else f"missed by {figure / bound - 1:.0%}"
        rows.append({"goal": text, "figure": figure, "bound": bound, "met": met, "missed": by})

    for preset in PRESETS:
        if case := found.get(f"train-{preset}"):
            at = f"at {case['case']['tokens']:,} tokens a step"
            for name, ratio in case["ratio"].items():
                if name == case["reference"]:
                    continue
                ours = name.partition("+")[0] == "spectron"
                bound = 1.0 if ours and preset in PRESETS[1:] else None
                goal(f"{preset}, {at}: {name} no slower than {case['reference']}", ratio, bound, below=False)
                if ours and preset == PRESETS[-1]:
                    flops = case["flop_share"][name]
                    text = f"{preset}, {at}: {name}, time per token (FLOP share {flops:.2f}, aim 0.70)"
                    goal(text, ratio, 0.80, below=False)
        if case := found.get(f"optimizer-{preset}"):
            for label, bound in (("512k", 0.01), ("32k", 0.05)):
                for form, value in case["share"][label].items():
                    text = f"{preset}: whole optimizer, {form}, of a step of {label} tokens"
                    goal(text, value, bound if form in ("published", "spectron") else None)
    if case := found.get("retraction"):
        way, least = min(((w, s) for w, s in case["seconds"].items() if w != "loop"), key=lambda pair: pair[1])
        goal(f"retraction of the 70B stack, seconds ({way})", least, 0.020)
    return rows


def show_goals(rows: list[Case]) -> None:
    """A line each."""
    for row in rows:
        verdict = "reported" if row["met"] is None else "met" if row["met"] else row["missed"]
        bound = "" if row["bound"] is None else f" (goal {row['bound']:g})"
        print(f"{row['goal']}: {row['figure']:.4g}{bound}: {verdict}")
