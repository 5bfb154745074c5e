"""What the two approaches of the field say of one law's runs, as records, with curves to draw.

Beside each estimate stands its interval (`bootstrap`), and how well each budget is predicted by the law of the
others.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nativerank.scaling import isoflop
from nativerank.scaling.bootstrap import drawn_minima, interval, without_each
from nativerank.scaling.isoflop import Budget
from nativerank.scaling.law import Array
from nativerank.scaling.parametric import NAMES, Problem
from nativerank.scaling.sweep import Sweep, scatter, warn_undetermined

# In 200 simulated sweeps of 4 budgets with 4 sizes each, resampled 95% intervals held the true exponent in 85%; with 5
# sizes or more in 96 to 99%.
FEW_SIZES = 4
COMPLETE = 0.95  # share of the resamples that must give every budget a minimum
LAST_FLOPS = 1e26  # how far the Spectron paper extrapolates
POINTS = 41
DRAWS = 200


def isoflop_record(sweep: Sweep, budgets: list[Budget], weights: Array) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first approach, and its curves."""
    options, profiles = sweep.options, [isoflop.profile(budget) for budget in budgets]
    good = isoflop.usable(budgets)
    sweep.warnings += [f"{p.flops:.3g} FLOPs take no part in the power laws: {p.fault}" for p in profiles if p.fault]
    if len(good) == isoflop.LEAST_BUDGETS:
        sweep.warnings.append("the power laws go through two budgets, so nothing says whether they are straight")
    log_flops = np.log([budget.flops for budget in good])
    point_n, point_d = isoflop.minima(good, np.ones((1, weights.shape[1])))
    few, free = min(budget.sizes for budget in good), sum(budget.scatter()[1] for budget in good)
    if few > FEW_SIZES or not free:
        many_n, many_d = isoflop.minima(good, weights)
    else:
        many_n, many_d = drawn_minima(good, options.samples, options.seed)
        sweep.warnings.append(
            f"a budget has {few} sizes, too few to resample: IsoFLOP intervals are Student's, "
            f"from the scatter of all budgets about their parabolas ({free} degrees of freedom)"
        )
    if not free:
        sweep.warnings.append("3 runs a budget leave no scatter to tell an interval from")
    lost = float((~np.isfinite(many_n)).any(1).mean())
    if lost > 1 - COMPLETE:
        sweep.warnings.append(f"{lost:.0%} of the resamples have a budget without a minimum")

    def span(values: Array) -> list[float] | None:
        return interval(values, options.level) if free else None

    record: dict[str, Any] = {}
    curves: dict[str, Any] = {"profiles": [profile_curve(budget) for budget in good]}
    ahead = np.geomspace(good[0].flops, max(LAST_FLOPS, good[-1].flops), POINTS)
    curves["draws"] = {}
    for key, name, point, many in (("n", "params", point_n, many_n), ("d", "tokens", point_d, many_d)):
        (start,), (slope,) = isoflop.power_law(log_flops, point)
        starts, slopes = isoflop.power_law(log_flops, many)
        if free:
            curves["draws"][name] = drawn([starts, slopes])
        record |= {f"{key}_exponent": float(slope), f"{key}_interval": span(slopes)}
        record[f"{key}_coefficient"] = float(np.exp(start))
        lines = starts[:, None] + slopes[:, None] * np.log(ahead)
        band = [span(raised(column)) for column in lines.T]
        curves[name] = {"flops": ahead.tolist(), "best": np.exp(start + slope * np.log(ahead)).tolist(), "band": band}
    spans = {b.flops: span(raised(column)) for b, column in zip(good, many_n.T, strict=True)}
    record["profiles"] = [asdict(p) | {"params_interval": spans.get(p.flops)} for p in profiles]
    record["prediction"] = predicted_minima(log_flops, point_n)
    return record, curves


def raised(logs: Array) -> Array:
    """Exponentials; of a wild resample they may be infinite."""
    with np.errstate(over="ignore"):
        return np.exp(logs)


def profile_curve(budget: Budget) -> dict[str, Any]:
    """A budget's parabola over its sizes."""
    middle, half = budget.frame
    v = np.linspace(-1, 1, POINTS)
    c = budget.coefficients(np.ones((1, len(budget.loss))))[0]
    loss = np.polynomial.polynomial.polyval(v, c)
    return {"flops": budget.flops, "params": np.exp(middle + half * v).tolist(), "loss": loss.tolist()}


def predicted_minima(log_flops: Array, log_params: Array) -> list[dict[str, float]] | None:
    """Each budget's N_opt from the line through the others; None with fewer than three."""
    count = len(log_flops)
    if count <= isoflop.LEAST_BUDGETS:
        return None
    rows = np.repeat(log_params, count, axis=0)
    start, slope = isoflop.power_law(log_flops, rows, ~np.eye(count, dtype=bool))
    errors = start + slope * log_flops - log_params[0]
    pairs = zip(np.exp(log_flops), errors, strict=True)
    return [{"flops": float(flops), "log_params_error": float(error)} for flops, error in pairs]


def parametric_record(
    sweep: Sweep, problem: Problem, theta: Array, budgets: list[Budget], weights: Array
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The second approach, and its curves."""
    law, level = problem.law, sweep.options.level
    fitted, many = problem.constants(theta), [problem.constants(row) for row in law.refine(theta, weights)]
    spans = {name: interval(np.array([getattr(p, name) for p in many]), level) for name in NAMES}
    exponents = {f"{k}_interval": interval(np.array([getattr(p, f"{k}_exponent") for p in many]), level) for k in "nd"}
    warn_undetermined(sweep, fitted.as_dict(), spans)
    record = fitted.as_dict() | exponents | {"intervals": spans, "scatter": scatter(law.log_loss - law.predict(theta))}
    record["prediction"] = predicted_losses(problem, theta, budgets)
    ahead = np.geomspace(budgets[0].flops, max(LAST_FLOPS, budgets[-1].flops), POINTS)
    best = fitted.best_params(ahead)
    band = [interval(column, level) for column in np.array([p.best_params(ahead) for p in many]).T]
    curves = {"params": {"flops": ahead.tolist(), "best": best.tolist(), "band": band}}
    columns = [np.array([getattr(p, name) for p in many]) for name in NAMES]
    return record, curves | {"draws": drawn(columns)}


def drawn(columns: Sequence[Array]) -> list[list[float]]:
    """The first DRAWS resamples of constants, a row each, for intervals of what follows from them."""
    rows = np.stack(columns, 1)
    rows = rows[np.isfinite(rows).all(1)][:DRAWS]
    return [[float(f"{value:.9g}") for value in row] for row in rows]


def predicted_losses(problem: Problem, theta: Array, budgets: list[Budget]) -> list[dict[str, float]] | None:
    """Mean absolute error of each budget's log losses in the law of the others; None where these are too few."""
    total = len(problem.law.log_loss)
    if len(budgets) <= isoflop.LEAST_BUDGETS or total - max(len(b.loss) for b in budgets) <= len(NAMES):
        return None
    others = problem.law.refine(theta, without_each(budgets, total))
    errors = np.abs(problem.law.predict(others) - problem.law.log_loss)
    return [
        {"flops": b.flops, "log_loss_error": float(row[b.members].mean())}
        for b, row in zip(budgets, errors, strict=True)
    ]
