"""The report of a sweep as one record: which groups are compared, and what `frontier` says of them.

    {"budget", "inference", "loss", "groups": {NAME: best model of the budget},
     "dense": NAME, "lowrank": NAME, "saving": {"at_budget", "interval", "curve", "paper", ...},
     "serving": {"loss", "served", "dense", "lowrank": cheapest models, "break_even"},
     "best_ratio": {METHOD: the budget's best rank ratio}, "warnings"}

What was not asked for, or cannot be told, is null.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nativerank.methods import METHODS
from nativerank.scaling.frontier import Side, best_model, break_even, cheapest, reached_loss, saving, saving_curve
from nativerank.scaling.surface import FamilyCost, Surface, best_shapes

FAR = 0.1  # decades beyond the runs from which on an extrapolation is warned of
CONSTANTS = ("E", "A", "B", "alpha", "beta", "gamma", "kappa", "rho_ref")


def decide(
    found: Mapping[str, Any],
    budget: float | None = None,
    inference: float | None = None,
    loss: float | None = None,
    dense: str | None = None,
    lowrank: str | None = None,
) -> dict[str, Any]:
    """The report of a fit.

    Args:
        found: record of `scaling.fit`.
        budget: training FLOPs; None is the largest of the runs.
        inference: tokens that will be served; None asks nothing of serving but the break-even.
        loss: that both sides must reach, in nats per token; None is that of the best dense model of the budget.
        dense, lowrank: names of groups; None finds them.

    Raises:
        ValueError: a number out of range, an unknown group, or a question that the fit cannot answer.
    """
    for name, value in (("budget", budget), ("inference", inference), ("loss", loss)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name} must be a finite number above 0, got {value:g}")
    sides = {name: Side(name, group) for name, group in found["groups"].items()}
    if not sides:
        raise ValueError("the fit holds no law of a group; fit with --approaches isoflop or parametric")
    if dense is not None and dense == lowrank:
        raise ValueError(f"--dense and --lowrank name one group, {dense!r}: nothing to compare")
    at = budget or max(side.last_budget for side in sides.values())
    full, thin = chosen(sides, dense, "dense"), chosen(sides, lowrank, "lowrank")
    record: dict[str, Any] = {
        "budget": at,
        "inference": inference,
        "loss": loss,
        "groups": {name: best_model(side, at) for name, side in sides.items()},
        "dense": full and full.name,
        "lowrank": thin and thin.name,
        "saving": None,
        "serving": None,
        "best_ratio": {m: best_ratio(s, at) for m, s in (found["surface"] or {}).items()},
        "warnings": too_far(sides, at),
    }
    if full and thin:
        best, band = saving(full, thin, np.array([at]))
        record["saving"] = {"at_budget": float(best[0]), "interval": band[0], **saving_curve(full, thin)}
    record["serving"] = serving(full, thin, at, inference, loss, record["warnings"])
    return record


def chosen(sides: Mapping[str, Side], name: str | None, kind: str) -> Side | None:
    """The group that was named, or else the one of this kind with the lowest loss at the largest budget.

    Raises:
        ValueError: there is none of this name.
    """
    if name is not None:
        if name not in sides:
            raise ValueError(f"--{kind}: the fit has no group {name!r} (groups: {', '.join(sides)})")
        return sides[name]
    fitting = [side for side in sides.values() if is_dense(side.group) == (kind == "dense")]
    return min(fitting, key=lowest_loss, default=None)


def is_dense(group: Mapping[str, Any]) -> bool:
    """Whether a group's models have dense matrices: by the method table, and for other names by the rank ratio."""
    row = METHODS.get(group["method"])
    return row.layer is None if row else group["rank_ratio"] is None


def lowest_loss(side: Side) -> float:
    """Of the runs of the largest budget."""
    return min(run["loss"] for run in side.group["curves"]["runs"] if run["budget"] == side.last_budget)


def serving(
    full: Side | None,
    thin: Side | None,
    budget: float,
    inference: float | None,
    loss: float | None,
    warnings: list[str],
) -> dict[str, Any] | None:
    """The cheapest models for a loss and the break-even; None where nobody asked and the laws do not say.

    Raises:
        ValueError: somebody asked, and the laws do not say.
    """
    asked = inference is not None or loss is not None
    there = [side for side in (full, thin) if side]
    try:
        if loss is None and full is None:
            raise ValueError("without a dense group --inference needs --loss, the loss to reach")
        target = reached_loss(full, budget) if loss is None and full else loss
        assert target is not None
        served = inference or 0.0
        found: dict[str, Any] = {"loss": target, "served": served, "dense": None, "lowrank": None, "break_even": None}
        for name, side in (("dense", full), ("lowrank", thin)):
            if side:
                found[name] = cheapest(side, target, served)
        if full and thin:
            found["break_even"] = break_even(full, thin, target)
    except ValueError as error:
        if asked:
            raise
        warnings.append(f"serving is left out: {error}")
        return None
    for side, key in zip(there, [n for n in ("dense", "lowrank") if found[n]], strict=True):
        trained, reaching = found[key]["train_flops"], f"{side.name}: reaching {target:.4g} takes"
        if trained > 10**FAR * side.last_budget:
            warnings.append(f"{reaching} {trained / side.last_budget:.3g} times the largest budget")
        elif trained * 10**FAR < side.first_budget:
            warnings.append(f"{reaching} {trained / side.first_budget:.3g} of the smallest budget")
    return found


def best_ratio(surface: Mapping[str, Any], flops: float) -> dict[str, Any]:
    """The rank ratio that a budget is best spent at, among those between the ones that ran."""
    constants = Surface(*(surface[name] for name in CONSTANTS))
    ratios = [float(ratio) for ratio in surface["mean_residual"]]
    found = best_shapes(constants, flops, FamilyCost(**surface["cost"]), min(ratios), max(ratios))
    return {name: float(value[0]) for name, value in found.items()}


def too_far(sides: Mapping[str, Side], budget: float) -> list[str]:
    """Warnings for groups whose runs say little about this budget."""
    warnings = []
    for side in sides.values():
        decades = max(math.log10(budget / side.last_budget), math.log10(side.first_budget / budget))
        if decades > FAR:
            beyond = "above" if budget > side.last_budget else "below"
            warnings.append(f"{side.name}: {budget:.3g} FLOPs lies {decades:.1f} decades {beyond} the runs")
    return warnings
