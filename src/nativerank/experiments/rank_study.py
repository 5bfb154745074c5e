"""Study of ranks that change: which threshold, when to look, whether to grow, and what it costs in loss.

Every arm has its method's default rates, so that only the ranks differ. Fixed ranks below the preset's stand beside the
adaptive ones: a run that ends with fewer parameters is to be compared with one that had few from the start.
"""

import statistics
from typing import Any

from nativerank.experiments.arms import Arm, shown
from nativerank.experiments.cell_log import all_rows
from nativerank.experiments.compare import Comparison
from nativerank.experiments.findings import Findings, at_multiple, mean_loss, signed
from nativerank.experiments.statistics import paired_difference

METHODS: dict[str, dict[str, Any]] = {"spectron": {}, "tsvd": {}}
A = "rank.adapt."
SHRINK: dict[str, Any] = {f"{A}grow": 0.0}
T = f"{A}threshold"
PLANS: tuple[dict[str, Any], ...] = (
    {},  # fixed; the reference
    {"rank.ratio": 0.1875},
    *({T: threshold, **SHRINK} for threshold in (0.95, 0.97, 0.98, 0.99)),
    {T: 0.97, f"{A}start": 0.3, **SHRINK},
    {T: 0.97, f"{A}every": 0.2, **SHRINK},
    {T: 0.97, f"{A}mode": "once", f"{A}start": 0.3},
    {T: 0.97},  # which may grow
)


def adaptive_rank(comparison: Comparison) -> None:
    """Every plan with every method, all seeds."""
    arms = []
    for method, own in METHODS.items():
        for plan in PLANS:
            settings = {**own, **plan}
            arms.append(Arm(shown(method, settings), method, settings, method))
    comparison.run_product(comparison.enter(arms), {})


def rank_findings(comparison: Comparison) -> Findings:
    """Of each arm: loss against fixed ranks, parameters and training FLOPs at the end, matrices whose rank changed."""
    found = Findings()
    for method, own in METHODS.items():
        reference = shown(method, dict(own))
        base = outcome(comparison, reference)
        for plan in PLANS:
            label = shown(method, {**own, **plan})
            now = outcome(comparison, label)
            if now is None or base is None:
                found.lines.append(f"{label}: no run to be read")
                continue
            tries = (comparison.tries[name].losses(at_multiple(comparison, name, 1)) for name in (label, reference))
            difference = paired_difference(*tries)
            entry = now | {"loss": mean_loss(comparison, label), "against": difference and difference._asdict()}
            found.numbers[label] = entry
            parameters, flops = (now[key] / base[key] for key in ("parameters", "train_flops"))
            found.lines.append(
                f"{label}: {signed(difference and difference.mean, None)} nats, {parameters:.2f} of the parameters "
                f"without embeddings, {flops:.2f} of the FLOPs, {now['changed']:.0%} of the ranks changed, "
                f"{now['smallest']:.0f} to {now['largest']:.0f}"
            )
    return found


def outcome(comparison: Comparison, label: str) -> dict[str, float] | None:
    """How an arm's runs ended, on average over the seeds; None where no run has a record."""
    point, ends = at_multiple(comparison, label, 1), []
    for seed in range(comparison.seeds):
        rows = all_rows(comparison.run_folder(label, point, seed))
        if not rows or "ranks" not in rows[-1]:
            continue
        end, moved = rows[-1], {name for row in rows if row.get("event") == "ranks" for name in row["ranks"]}
        ranks = list(end["ranks"].values())
        ends.append(
            {
                "parameters": end["parameters"]["non_embedding"],
                "train_flops": end["train_flops"],
                "changed": len(moved) / len(ranks),
                "smallest": min(ranks),
                "largest": max(ranks),
            }
        )
    return {key: statistics.fmean(end[key] for end in ends) for key in ends[0]} if ends else None
