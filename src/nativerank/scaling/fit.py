"""A sweep fitted in every way this room knows, as one record.

One law describes runs of one method and one rank ratio, so runs fall into groups by these:

    {"groups": {NAME: GROUP}, "surface": {METHOD: SURFACE} or null, "warnings": [...]}

    GROUP = {"isoflop": {"n_exponent", "d_exponent", "n_interval", "d_interval", "n_coefficient", "d_coefficient",
                         "profiles": [{"flops", "sizes", "params", "tokens", "loss", "params_error",
                                       "params_interval", "fault"}],
                         "prediction": [{"flops", "log_params_error"}]},
             "parametric": {"E", "A", "B", "alpha", "beta", "n_exponent", "d_exponent", "n_interval", "d_interval",
                            "intervals": {NAME: [low, high]}, "scatter", "prediction": [{"flops", "log_loss_error"}]},
             "method", "rank_ratio", "runs", "left_out": [{"source", "reason"}], "warnings": [...], "curves": {...}}

"curves" holds what figures and `frontier` need: the runs, parabolas, laws up to 1e26 FLOPs with bands, and "draws",
some resamples of log coefficient and exponent (isoflop) and of E, A, B, alpha, beta (parametric).

    SURFACE = {"E", "A", "B", "alpha", "beta", "gamma", "kappa", "rho_ref", "intervals", "scatter",
               "mean_residual": {RATIO: ...}, "cost", "runs", "left_out", "warnings",
               "best": [{"flops", "params", "tokens", "rank_ratio", "loss", "rank_interval", "inside"}]}

of methods that ran with 3 ratios or more. Of a single group "isoflop" and "parametric" stand at the top, too.

What was not asked for, or cannot be told, is null. params_error: standard error of log N at the minimum, which is a
relative one. prediction: of each budget by the law of the others, the error of log N_opt and the mean absolute error
of log losses. scatter: of residuals in log loss, 1.48 times the median size. A run far above its law is taken for one
that diverged and left out of all of it; of a cell that ran with several learning rates the best one counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from nativerank.scaling.entries import isoflop_record, parametric_record
from nativerank.scaling.isoflop import budgets_of
from nativerank.scaling.parametric import Problem
from nativerank.scaling.rank_entry import fit_surfaces
from nativerank.scaling.rates import best_rates
from nativerank.scaling.records import Run, with_budgets
from nativerank.scaling.sweep import Options, Sweep, settled

T = TypeVar("T")


def fit(
    runs: Sequence[Run],
    options: Options | None = None,
    watch: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Everything that the runs tell; see above for what comes out.

    Args:
        runs: as `sources.read_runs` gives them. options: None for the defaults.
        watch: told which law is fitted, how many are done, of how many.

    Raises:
        ValueError: the runs of a group do not suffice for an approach that was asked for.
    """
    options, runs = options or Options(), with_budgets(runs)
    if not runs:
        raise ValueError("there are no runs to fit")
    missing = [run for run in runs if not run.loss > 0]
    if missing:
        raise ValueError(f"{missing[0].source or missing[0]}: a loss of {missing[0].loss} cannot be fitted")
    runs, warnings = best_rates(runs)
    order = sorted(runs, key=lambda run: (run.method, run.rank_ratio or 0))
    names = list(dict.fromkeys(run.group for run in order))
    groups: dict[str, Any] = {}
    single = names if {"isoflop", "parametric"} & set(options.wanted) else ()
    laws = len(single) + ("surface" in options.wanted)
    for done, name in enumerate(single):
        watch("laws", done, laws)
        try:
            groups[name] = fit_group([run for run in runs if run.group == name], options)
        except ValueError as error:
            text = f"{name}: {error}" if len(names) > 1 else str(error)
            if options.approaches is not None or (name == names[-1] and not groups):
                raise ValueError(text) from None
            warnings.append(f"no law for {text}")
    surfaces = None
    if "surface" in options.wanted:
        watch("laws", len(single), laws)
        surfaces, more = fit_surfaces(runs, options)
        warnings += more
    top = {key: groups[names[0]][key] for key in ("isoflop", "parametric")} if len(groups) == len(names) == 1 else {}
    return {**top, "groups": groups, "surface": surfaces, "warnings": warnings}


def fit_group(runs: Sequence[Run], options: Options) -> dict[str, Any]:
    """The record of runs that one law describes.

    Raises:
        ValueError: they do not suffice for an approach that was asked for, or for any.
    """
    sweep = Sweep.of(runs, options)
    found: dict[str, Any] = {"isoflop": None, "parametric": None}
    faults: list[str] = []
    fitted = attempt(lambda: settled(sweep, Problem.of), options, faults) if "parametric" in options.wanted else None
    budgets = budgets_of(sweep.runs)
    weights = sweep.weights(budgets)
    curves: dict[str, Any] = {"runs": [asdict(run) for run in sweep.runs]}
    if "isoflop" in options.wanted:
        made = attempt(lambda: isoflop_record(sweep, budgets, weights), options, faults)
        if made is not None:
            found["isoflop"], curves["isoflop"] = made
    if fitted is not None:
        found["parametric"], curves["parametric"] = parametric_record(sweep, *fitted, budgets, weights)
    if found["isoflop"] is None and found["parametric"] is None:
        raise ValueError("; ".join(faults))
    rest = {"runs": len(sweep.runs), "left_out": sweep.left_out, "warnings": faults + sweep.warnings, "curves": curves}
    return {**found, "method": runs[0].method, "rank_ratio": runs[0].rank_ratio, **rest}


def attempt(make: Callable[[], T], options: Options, faults: list[str]) -> T | None:
    """What is made; None, with the reason in `faults`, where the runs do not suffice and nobody asked for just this."""
    try:
        return make()
    except ValueError as error:
        if options.approaches is not None:
            raise
        faults.append(str(error))
        return None
