"""What Spectron's algebra and self-guided training cost."""

from pathlib import Path
from typing import Any

from nativerank.reproduce.figure import draw_bars
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, Verdict

PAPER_TOKENS = 1_048_576  # of a step
BAND = (0.2, 0.3)  # of self-guided training's extra


def judge(seen: Seen) -> dict[str, Verdict]:
    return {"spectron": spectron(seen), "self-guided": guided(seen)}


def layer(seen: Seen) -> dict[str, Any]:
    """The case of `bench optimizer` that times one layer."""
    cases = seen.outcome.measures["optimizer"]["cases"]
    found: dict[str, Any] = next(case for case in cases if case["case"]["part"] == "layer")
    return found


def spectron(seen: Seen) -> Verdict:
    """The update's share of the FLOPs at the paper's batch, and of the time of a layer and of a small step."""
    share = seen.outcome.measures["spectron"]["flops"]["optimizer_over_exact"]
    case, step = layer(seen), seen.outcome.measures["steps"]["cases"][0]
    timed, tokens = case["ratio"]["spectron"], case["case"]["tokens_per_step"]
    small = step["seconds"]["spectron"] / step["seconds"]["lowrank-adamw"]
    why = (
        f"{share:.2%} of the training FLOPs of the 94M model at {PAPER_TOKENS:,} tokens a step (exact count); "
        f"timed, {timed:.2%} of forward and backward pass of a layer of width {case['case']['d_model']} at {tokens:,} "
        f"tokens, so below 1% from {timed * tokens / 0.01:,.0f} tokens on; a step of {step['case']['tokens']:,} tokens "
        f"of the small model takes {small:.2f} of naive AdamW's time"
    )
    return Verdict(REPRODUCED if share < 0.01 else NOT, why)


def guided(seen: Seen) -> Verdict:
    """Training FLOPs of self-guided over those of naive low rank and of dense, in Spectron's smallest model."""
    plans = seen.outcome.measures
    ours, naive = (plans[name]["flops"]["per_token"]["exact"] for name in ("self-guided", "naive"))
    of_dense, of_naive = (
        (ours - naive) / total for total in (plans["naive"]["dense"]["flops"]["per_token"]["exact"], naive)
    )
    why = f"the guide adds {of_naive:.0%} to the training FLOPs of low rank, {of_dense:.0%} of dense ones (exact count)"
    reached = any(BAND[0] <= share <= BAND[1] for share in (of_dense, of_naive))
    return Verdict(REPRODUCED if reached else DIRECTION if ours > naive else NOT, why)


def draw(seen: Seen, file: Path) -> Path:
    cases = {case["case"]["part"]: case for case in seen.outcome.measures["optimizer"]["cases"]}
    shares = {name: 100 * cases["layer"]["ratio"][name] for name in ("spectron", "certified", "exact", "plain")}
    names = {"spectron": "Spectron, r x r", "certified": "certified", "exact": "exact norms", "plain": "as published"}
    tokens = cases["layer"]["case"]["tokens_per_step"]
    unit = f"% of forward and backward pass of a layer, {tokens:,} tokens a step"
    return draw_bars({names[name]: share for name, share in shares.items()}, unit, file, (1.0, "1%"))
