"""Study of replicas that train on their own (`train.diloco`): what the loss is when they meet every H steps only.

All arms read the same tokens in steps of equal size, dealt out to 2 or 4 processes. Beside each number of processes
stands synchronous training on as many. What they send falls with H: in both cases it is the weights or their gradients,
twice a meeting or step (`optim.outer`), so their ratio is H.

The published outer momentum, 0.9, remembers ten meetings. Where these are most of a run the weights go on long after
the rate has fallen, so the arms have 0.5; the published one stands beside them, as it is and with its steps capped.
"""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from nativerank.experiments.arms import Arm, shown
from nativerank.experiments.cell_log import last_rows
from nativerank.experiments.compare import Comparison
from nativerank.experiments.findings import Findings, at_multiple, lack, mean_loss, signed
from nativerank.experiments.statistics import paired_difference

PROCESSES = (2, 4)
EVERY, MOMENTUM, CAP = (f"parallel.diloco.{key}" for key in ("every", "momentum", "cap"))
SHORT: dict[str, Any] = {MOMENTUM: 0.5}  # for runs of few meetings
OUTER: tuple[dict[str, Any], ...] = (
    *({EVERY: every, **SHORT} for every in (5, 20, 50)),
    {EVERY: 20},  # as published
    {EVERY: 20, CAP: 1.0},
)
METHODS = {"spectron": OUTER, "stiefel-spectron": OUTER[1:2]}


def replicas(method: str, processes: int, outer: Mapping[str, Any]) -> Arm:
    """An arm of so many processes; without an outer step synchronous."""
    settings = {"parallel.replicas": processes, "parallel.shards": 1, **outer}
    return Arm(shown(method, settings), method, settings, f"{method}, {processes} processes")


def arms() -> Iterator[tuple[Arm, Arm]]:
    """Every arm with the synchronous one beside it."""
    for method, outer in METHODS.items():
        for processes in PROCESSES:
            together = replicas(method, processes, {})
            yield from ((replicas(method, processes, settings), together) for settings in ({}, *outer))


def diloco(comparison: Comparison) -> None:
    """Every arm at its method's default rates, all seeds."""
    comparison.run_product(comparison.enter(arm for arm, _ in arms()), {})


def diloco_findings(comparison: Comparison) -> Findings:
    """Of each arm: the loss against synchronous training, and what its outer steps did."""
    found = Findings()
    for arm, together in arms():
        label = arm.label
        if arm.label == together.label:
            continue
        losses = (comparison.tries[name].losses(at_multiple(comparison, name, 1)) for name in (label, together.label))
        difference = paired_difference(*losses)
        entry = {"loss": mean_loss(comparison, label), "against": difference and difference._asdict()}
        entry |= outer_steps(comparison, label)
        found.numbers[label] = entry
        words = f"{label}: {signed(difference and difference.mean, lack(comparison, label))} nats"
        if "gap" in entry:
            words += (
                f"; outer steps move W by {entry['step']:.2f} of the inner rates' sum, factors' means lose "
                f"{entry['gap']:.1%} of that"
            )
        found.lines.append(words)
    return found


def outer_steps(comparison: Comparison, label: str) -> dict[str, float]:
    """Medians over the outer steps of the first seed: the largest ||dW|| against the sum of the round's rates, and the
    largest ||mean W - W of the mean factors|| against that ||dW||; nothing where no run has a record."""
    rows = last_rows(comparison.run_folder(label, at_multiple(comparison, label, 1), 0))
    outer = [row["outer"] for row in rows if "outer" in row]
    if not outer:
        return {}
    return {
        "step": statistics.median(o["update_norm"] / o["budget"] for o in outer),
        "gap": statistics.median(o["factor_gap"] / o["update_norm"] for o in outer),
    }
