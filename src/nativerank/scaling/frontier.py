"""What the laws of a sweep say about a decision: which model to train, dense or in low rank, and what serving it costs.

    best model of a budget       N = a C^alpha, D = b C^beta                            (IsoFLOP; else parametric)
    saving at inference          1 - N_lowrank(C) / N_dense(C)                          2 N FLOPs per served token
    cheapest model for a loss    min over N of c(N) D(N) + (c(N) / 3) T,  L(N, D(N)) = loss           (parametric)
    break-even                   the T at which both sides' cheapest models cost the same

c(N) is what a token of training costs, 6 N by the convention 6nd; by "exact" it is fitted to the FLOPs of the runs
(`surface.FamilyCost` at one ratio); a forward pass is a third of it. T is the number of tokens that are served.

The Spectron paper compares the two laws N_opt ~ C^0.479 (low rank) and C^0.49 (dense) and extrapolates to 1e26 FLOPs,
where "up to 50%" of inference is saved. Its prefactors are not published. With equal prefactors, laws that meet at
C = 1, the saving is 1 - C^(0.479 - 0.49); laws that meet at C0 save 1 - (C / C0)^(0.479 - 0.49).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nativerank.scaling.bootstrap import interval
from nativerank.scaling.law import Array
from nativerank.scaling.parametric import NAMES, Parametric
from nativerank.scaling.surface import fit_twin_cost

LAST_FLOPS = 1e26  # how far the Spectron paper extrapolates
PAPER = {"lowrank": (0.479, 0.521), "dense": (0.49, 0.51)}  # exponents of N and D
POINTS = 61
FORWARD = 3  # times which a training pass costs a forward pass
SIZES = 4001  # of the grid over log N on which a cheapest model is looked for
MOST_TOKENS = 1e18  # served, beyond which no break-even is looked for
SERVED = 145  # of the points at which the two sides are compared, eight to a decade
BISECTIONS = 50


@dataclass(frozen=True)
class Side:
    """One group of a fit.

    Attributes:
        name: of the group. group: its record. level: of intervals.
    """

    name: str
    group: Mapping[str, Any]
    level: float = 0.95

    @property
    def law(self) -> Parametric | None:
        """The parametric law, if there is one."""
        found = self.group["parametric"]
        return Parametric(*(found[name] for name in NAMES)) if found else None

    @property
    def laws(self) -> list[Parametric]:
        """Resamples of it."""
        return [Parametric(*row) for row in self.group["curves"]["parametric"]["draws"]]

    @property
    def last_budget(self) -> float:
        """The largest FLOPs of a run."""
        return float(max(run["budget"] for run in self.group["curves"]["runs"]))

    @property
    def first_budget(self) -> float:
        """The smallest."""
        return float(min(run["budget"] for run in self.group["curves"]["runs"]))

    def cost(self) -> Callable[[Array], Array]:
        """Training FLOPs of a token, by the size of the model."""
        return fit_twin_cost(self.group["curves"]["runs"])

    def best(self, key: str, flops: Array | float) -> Array:
        """N ("params") or D ("tokens") of the best model at C."""
        iso = self.group["isoflop"]
        if iso:
            short = {"params": "n", "tokens": "d"}[key]
            return np.asarray(iso[f"{short}_coefficient"] * np.asarray(flops) ** iso[f"{short}_exponent"])
        assert self.law is not None
        params = self.law.best_params(flops)
        return params if key == "params" else np.asarray(flops) / 6 / params

    def draws(self, key: str, flops: Array) -> Array | None:
        """The same of each resample, (S, len(flops)); None where nothing is known of the scatter."""
        if self.group["isoflop"]:
            rows = self.group["curves"]["isoflop"]["draws"].get(key)
            if not rows:
                return None
            start, slope = np.array(rows).T[:, :, None]
            with np.errstate(over="ignore"):
                return np.asarray(np.exp(start + slope * np.log(flops)))
        params = np.array([law.best_params(flops) for law in self.laws])
        return params if key == "params" else flops / 6 / params

    @property
    def source(self) -> str:
        """Which approach the best models come from."""
        return "isoflop" if self.group["isoflop"] else "parametric"


def best_model(side: Side, flops: float) -> dict[str, Any]:
    """The best model of a budget: size, tokens, what serving it costs, and the loss to expect."""
    found: dict[str, Any] = {"source": side.source}
    at = np.array([flops])
    for key in ("params", "tokens"):
        many = side.draws(key, at)
        found[key] = float(side.best(key, flops))
        found[f"{key}_interval"] = None if many is None else interval(many[:, 0], side.level)
    found["tokens_per_param"] = found["tokens"] / found["params"]
    found["forward_flops_per_token"] = float(side.cost()(np.array(found["params"]))) / FORWARD
    law = side.law
    found["loss"] = None if law is None else float(law.loss(found["params"], found["tokens"]))
    many = None if law is None else np.array([p.loss(found["params"], found["tokens"]) for p in side.laws])
    found["loss_interval"] = None if many is None else interval(many, side.level)
    return found


def saving(dense: Side, lowrank: Side, flops: Array) -> tuple[Array, list[list[float] | None]]:
    """(share of parameters that the best low-rank model of each budget saves, its intervals)."""
    best = 1 - lowrank.best("params", flops) / dense.best("params", flops)
    ours, theirs = lowrank.draws("params", flops), dense.draws("params", flops)
    if ours is None or theirs is None:
        return best, [None] * len(flops)
    count = min(len(ours), len(theirs))
    # Both were drawn with one seed; in another order they are independent.
    shuffled = np.random.default_rng(0).permutation(len(theirs))[:count]
    with np.errstate(all="ignore"):
        many = 1 - ours[:count] / theirs[shuffled]
    return best, [interval(column, dense.level) for column in many.T]


def saving_curve(dense: Side, lowrank: Side) -> dict[str, Any]:
    """The saving from the first budget to 1e26 FLOPs, with the paper's exponents for comparison."""
    first, last = min(dense.first_budget, lowrank.first_budget), max(dense.last_budget, lowrank.last_budget)
    flops = np.geomspace(first, max(LAST_FLOPS, last), POINTS)
    best, band = saving(dense, lowrank, flops)
    return {
        "curve": {"flops": flops.tolist(), "best": best.tolist(), "band": band},
        "last_budget": last,
        "decades_beyond": max(0.0, float(np.log10(LAST_FLOPS / last))),
        "paper": paper_saving(flops),
    }


def paper_saving(flops: Array) -> dict[str, Any]:
    """The paper's "up to 50%" as arithmetic with its exponents alone."""
    slope = PAPER["lowrank"][0] - PAPER["dense"][0]
    meeting = LAST_FLOPS * 2.0 ** (1 / slope)  # where laws must meet that save a half at the end
    return {
        "label": "paper's exponents, equal prefactors",
        "exponents": {name: list(pair) for name, pair in PAPER.items()},
        "flops": flops.tolist(),
        "saving": (1 - flops**slope).tolist(),
        "at_last": 1 - LAST_FLOPS**slope,
        "at_last_if_meeting_at_2.2e18": 1 - (LAST_FLOPS / 2.2e18) ** slope,
        "half_if_meeting_at": meeting,
    }


def reaching(side: Side, loss: float) -> tuple[Array, Array, Array]:
    """Models that reach a loss, from the smallest that can: (N, D, training FLOPs per token), (SIZES,) each.

    Raises:
        ValueError: there is no parametric law, or none of its models reaches the loss.
    """
    law = side.law
    if law is None:
        raise ValueError(f"{side.name} has no parametric law, which --loss and --inference need")
    if loss <= law.E:
        raise ValueError(f"a loss of {loss:g} is not above E = {law.E:.4g}, which no model of {side.name} goes below")
    smallest = (law.A / (loss - law.E)) ** (1 / law.alpha)
    params = np.exp(np.log(smallest) + np.geomspace(1e-4, np.log(1e9), SIZES))
    tokens = (law.B / (loss - law.E - law.A * params**-law.alpha)) ** (1 / law.beta)
    return params, tokens, side.cost()(params)


def cheapest(side: Side, loss: float, served: float) -> dict[str, float]:
    """The model that reaches a loss at the lowest cost of training and serving.

    Args:
        loss: in nats per token. served: tokens, 0 for training alone.

    Returns:
        params, tokens, train_flops, serve_flops, total_flops.

    Raises:
        ValueError: there is no parametric law, or none of its models reaches the loss.
    """
    params, tokens, per_token = reaching(side, loss)
    train, serve = per_token * tokens, per_token / FORWARD * served
    i = int(np.argmin(train + serve))
    found = {"params": params[i], "tokens": tokens[i], "train_flops": train[i], "serve_flops": serve[i]}
    return {name: float(value) for name, value in found.items()} | {"total_flops": float(train[i] + serve[i])}


def break_even(dense: Side, lowrank: Side, loss: float) -> dict[str, Any]:
    """How many tokens must be served until the other side costs less in all.

    Returns:
        {"tokens", "before", "after", "again"}: the side that is cheaper when fewer, and when more than `tokens` are
        served; tokens is None where that is one side, up to 1e18. again: where the sides change places once more.
    """
    lines = []
    for side in (lowrank, dense):
        _, tokens, per_token = reaching(side, loss)
        lines.append((per_token * tokens, per_token / FORWARD))

    def lowrank_costs_less(served: float) -> bool:
        low, full = (float((train + serve * served).min()) for train, serve in lines)
        return low <= full

    points = [0.0, *np.geomspace(1.0, MOST_TOKENS, SERVED)]
    less = [lowrank_costs_less(served) for served in points]
    places = [k for k in range(SERVED) if less[k] != less[k + 1]]
    crossings = [crossing(lowrank_costs_less, points[k], points[k + 1]) for k in places]
    names = {True: "lowrank", False: "dense"}
    after = less[places[0] + 1] if places else less[0]
    first = crossings[0] if crossings else None
    return {"tokens": first, "before": names[less[0]], "after": names[after], "again": crossings[1:]}


def crossing(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where an answer changes between two points, by bisection."""
    before = holds(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) == before else (low, middle)
    return float(high)


def reached_loss(dense: Side, flops: float) -> float:
    """The loss of the best dense model of a budget, which both sides are then asked for."""
    found = best_model(dense, flops)["loss"]
    if found is None:
        raise ValueError(f"{dense.name} has no parametric law, which --inference needs; give more runs")
    return float(found)
