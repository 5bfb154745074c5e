"""SCT's memory: one matrix, a 70B-shaped training step, and a whole small model."""

from pathlib import Path
from typing import Any

from nativerank.reproduce.figure import draw_bars
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict

GB = 1e9
CLAIMED_STEP, CLAIMED_SAVING = 7.2 * GB, 0.46


def judge(seen: Seen) -> dict[str, Verdict]:
    return {"matrix": matrix(seen), "step": step(seen), "model": model(seen), "speed": speed(seen)}


def matrix(seen: Seen) -> Verdict:
    """The ratio of one 8192 x 28672 matrix, which is arithmetic."""
    found = next(m for m in seen.outcome.measures["plain"]["arithmetic"]["matrices"] if m["model"] == "LLaMA-70B")
    why = (
        f"{found['ratio']:.1f}: {found['dense_bytes'] / 1e6:,.1f} MB of weight, gradient and two moments against "
        f"{found['factored_bytes'] / 1e6:.1f} MB at rank {found['rank']}; arithmetic of one matrix, no activations"
    )
    return Verdict(REPRODUCED if round(found["ratio"]) == 199 else NOT, why)


def variant(seen: Seen, measure: str) -> dict[str, Any]:
    """The measured step of a run of `bench step70b`."""
    found: dict[str, Any] = seen.outcome.measures[measure]["cases"][0]
    return found


def step(seen: Seen) -> Verdict:
    """Peak memory of a fresh process that makes two steps."""
    peaks = {name: variant(seen, name)["peak_rss_bytes"] for name in ("plain", "layerwise", "half")}
    why = (
        f"peak of the process {peaks['plain'] / GB:.2f} GB with a plain step, {peaks['layerwise'] / GB:.2f} GB with "
        f"updates inside the backward pass, {peaks['half'] / GB:.2f} GB with moments in bf16 too; the published 7.2 GB "
        "is parameters x 16 bytes, without activations and process"
    )
    word = REPRODUCED if peaks["plain"] <= CLAIMED_STEP else DIRECTION if peaks["layerwise"] <= CLAIMED_STEP else NOT
    return Verdict(word, why)


def model(seen: Seen) -> Verdict:
    """Planned bytes of SmolLM2-1.7B with its MLPs at rank 32, beside the dense model; a plan reproduces nothing."""
    plan = seen.outcome.measures["smollm"]
    ours, dense = plan["bytes"]["peak"], plan["dense"]["bytes"]["peak"]
    saved = 1 - ours / dense
    why = f"planned, not measured: {ours / GB:.1f} GB against {dense / GB:.1f} GB, {saved:.0%} less"
    return Verdict(DIRECTION if saved >= CLAIMED_SAVING else NOT, why)


def speed(seen: Seen) -> Verdict:
    """Needs the card that it was published for."""
    return Verdict(UNTESTABLE, "a claim about a step on one A100, which takes a GPU")


def draw(seen: Seen, file: Path) -> Path:
    names = {"plain": "plain step", "layerwise": "updates in the backward pass", "half": "and moments in bf16"}
    peaks = {words: variant(seen, name)["peak_rss_bytes"] / GB for name, words in names.items()}
    return draw_bars(peaks, "peak of the process, GB", file, (CLAIMED_STEP / GB, "published"))
