"""The share of a 70B-shaped step that the retraction takes."""

from pathlib import Path

from nativerank.reproduce.figure import draw_bars
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, Verdict

CLAIMED = (0.4, 0.5)


def judge(seen: Seen) -> dict[str, Verdict]:
    races = seen.outcome.measures["literal"]["literal"]
    one = next((race for race in races if race["threads"] == 1), races[0])
    shares = {name: one[name]["retraction"] / one[name]["step"] for name in ("literal", "ours")}
    why = (
        f"{shares['literal']:.0%} of the step in the paper's form (one QR after the other), {shares['ours']:.0%} in "
        f"ours (batched, through r x r Cholesky factors), whose step takes {one['ratio']['step']:.2f} of the time; "
        f"{one['threads']} thread, no embedding, head or attention"
    )
    share = shares["literal"]
    word = REPRODUCED if CLAIMED[0] <= share <= CLAIMED[1] else DIRECTION if share >= 0.2 else NOT
    return {"share": Verdict(word, why)}


def draw(seen: Seen, file: Path) -> Path:
    race = seen.outcome.measures["literal"]["literal"][0]
    names = {"literal": "paper's form", "ours": "ours"}
    parts = ("forward", "backward", "optimizer", "retraction")
    return draw_bars(
        {f"{part}, {words}": race[name][part] for part in parts for name, words in names.items()}, "s", file
    )
