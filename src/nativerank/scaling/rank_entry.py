"""What the law with rank says of one method's runs, as a record, with the ratio that compute is best spent at."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nativerank.scaling.bootstrap import interval
from nativerank.scaling.isoflop import budgets_of
from nativerank.scaling.records import Run
from nativerank.scaling.surface import LEAST_RATIOS, SurfaceProblem, best_shapes, fit_cost, is_inside
from nativerank.scaling.sweep import Options, Sweep, scatter, settled, warn_undetermined


def fit_surfaces(runs: Sequence[Run], options: Options) -> tuple[dict[str, Any] | None, list[str]]:
    """(the law with rank for every method that ran with enough ratios, None if none did; warnings).

    Raises:
        ValueError: none did, and nothing else was asked for; or one that did has too few runs.
    """
    found, warnings = {}, []
    for method in dict.fromkeys(run.method for run in runs):
        mine = [run for run in runs if run.method == method and run.rank_ratio is not None]
        if len({run.rank_ratio for run in mine}) >= LEAST_RATIOS:
            try:
                found[method or "all"] = surface_record(mine, options)
            except ValueError as error:
                if options.approaches is not None:
                    raise ValueError(f"{method or 'all'}: {error}") from None
                warnings.append(f"no law with rank for {method or 'all'}: {error}")
    if not found and options.approaches is not None:
        raise ValueError(f"the law with rank needs a method that ran with {LEAST_RATIOS} rank ratios")
    return found or None, warnings


def surface_record(runs: Sequence[Run], options: Options) -> dict[str, Any]:
    """The law with rank of one method's runs."""
    sweep = Sweep.of(runs, options)
    problem, theta = settled(sweep, SurfaceProblem.of)
    runs, level = sweep.runs, options.level
    ratios, residual = np.array([run.rank_ratio for run in runs]), problem.law.log_loss - problem.law.predict(theta)
    budgets = budgets_of(runs)
    surface, many = problem.constants(theta), problem.constants(problem.law.refine(theta, sweep.weights(budgets)))
    constants, columns = surface.as_dict(), many.as_dict()
    spans = {name: interval(np.ravel(columns[name]), level) for name in constants if name != "rho_ref"}
    warn_undetermined(sweep, constants, spans)
    cost, low, high = fit_cost(runs), float(ratios.min()), float(ratios.max())
    best = []
    for flops in (budget.flops for budget in budgets):
        point = {key: float(value[0]) for key, value in best_shapes(surface, flops, cost, low, high).items()}
        spread = best_shapes(many, flops, cost, low, high)["rank_ratio"]
        inside = is_inside(point["rank_ratio"], low, high)
        best.append({"flops": flops} | point | {"rank_interval": interval(spread, level), "inside": inside})
    if not all(row["inside"] for row in best):
        sweep.warnings.append(f"the best rank ratio lies at an end of those that ran ({low:g} to {high:g})")
    by_ratio = {f"{rho:g}": float(residual[ratios == rho].mean()) for rho in np.unique(ratios)}
    scale = {"scatter": scatter(residual), "mean_residual": by_ratio}
    rest = {"runs": len(runs), "left_out": sweep.left_out, "warnings": sweep.warnings}
    return constants | {"intervals": spans, "cost": asdict(cost), "best": best} | scale | rest
