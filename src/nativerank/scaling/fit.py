"""A sweep fitted in every way this room knows, as one record.

    {"isoflop": {"n_exponent", "d_exponent", "n_interval", "d_interval", "n_coefficient", "d_coefficient",
                 "profiles": [{"flops", "sizes", "params", "tokens", "loss", "params_error", "params_interval",
                               "fault"}],
                 "prediction": [{"flops", "log_params_error"}]},
     "parametric": {"E", "A", "B", "alpha", "beta", "n_exponent", "d_exponent", "n_interval", "d_interval",
                    "intervals": {NAME: [low, high]}, "scatter", "prediction": [{"flops", "log_loss_error"}]},
     "runs", "left_out": [{"source", "reason"}], "warnings": [...], "curves": {...}, "surface": null}

One law describes runs of one method and one rank ratio. Where there are several, these records stand in "groups" by
name, and "surface" holds, for each method that ran with 3 ratios or more,

    {"E", "A", "B", "alpha", "beta", "gamma", "kappa", "rho_ref", "intervals", "scatter", "mean_residual": {RATIO: ...},
     "cost", "best": [{"flops", "params", "tokens", "rank_ratio", "loss", "rank_interval", "inside"}],
     "runs", "left_out", "warnings"}

What was not asked for, or cannot be told, is null. params_error: standard error of log N at the minimum, which is a
relative one. prediction: of each budget by the law of the others, the error of log N_opt and the mean absolute error
of log losses. scatter: of residuals in log loss, 1.48 times the median size. A run far above its law is taken for one
that diverged and left out of all of it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nativerank.scaling.entries import isoflop_record, parametric_record
from nativerank.scaling.isoflop import budgets_of
from nativerank.scaling.parametric import Problem
from nativerank.scaling.rank_entry import fit_surfaces
from nativerank.scaling.records import Run, with_budgets
from nativerank.scaling.sweep import Options, Sweep, settled


def fit(runs: Sequence[Run], options: Options | None = None) -> dict[str, Any]:
    """Everything that the runs tell; see above for what comes out.

    Args:
        runs: as `records.read_runs` gives them. options: None for the defaults.

    Raises:
        ValueError: the runs of a group do not suffice for an approach that was asked for.
    """
    options, runs = options or Options(), with_budgets(runs)
    if not runs:
        raise ValueError("there are no runs to fit")
    missing = [run for run in runs if not run.loss > 0]
    if missing:
        raise ValueError(f"{missing[0].source or missing[0]}: a loss of {missing[0].loss} cannot be fitted")
    names = list(dict.fromkeys(run.group for run in sorted(runs, key=lambda r: (r.method, r.rank_ratio or 0))))
    groups = {}
    for name in names:
        try:
            groups[name] = fit_group([run for run in runs if run.group == name], options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if len(names) > 1 else str(error)) from None
    if len(names) == 1 and tuple(options.approaches) != ("surface",):
        return groups[names[0]] | {"surface": None}
    surfaces = fit_surfaces(runs, options) if "surface" in options.approaches else None
    return {"groups": groups, "surface": surfaces}


def fit_group(runs: Sequence[Run], options: Options) -> dict[str, Any]:
    """The record of runs that one law describes."""
    sweep, fitted = Sweep.of(runs, options), None
    if "parametric" in options.approaches:
        fitted = settled(sweep, Problem.of)
    budgets = budgets_of(sweep.runs)
    weights = sweep.weights(budgets)
    found: dict[str, Any] = {"isoflop": None, "parametric": None}
    curves: dict[str, Any] = {"runs": [asdict(run) for run in sweep.runs]}
    if "isoflop" in options.approaches:
        found["isoflop"], curves["isoflop"] = isoflop_record(sweep, budgets, weights)
    if fitted is not None:
        found["parametric"], curves["parametric"] = parametric_record(sweep, *fitted, budgets, weights)
    rest = {"runs": len(sweep.runs), "left_out": sweep.left_out, "warnings": sweep.warnings, "curves": curves}
    return found | rest
