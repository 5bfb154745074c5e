"""A sweep at equal compute as an experiment of a card: its cells in the cards' grid, fitted and decided.

What is kept of the fit are exponents, minima and intervals, and of its report the saving at the largest budget.
"""

from typing import Any

from nativerank.experiments.arms import parse_arm
from nativerank.experiments.grid import Cell
from nativerank.reproduce.card import Scale, Sweep
from nativerank.reproduce.place import Place

LAWS = ("n_exponent", "d_exponent", "n_interval", "d_interval")
KEPT = (
    *("size", "method", "rank_ratio", "budget", "lr", "seed", "steps", "tokens", "params", "flops", "val_loss"),
    *("error", "diverged"),
)
PROFILE = ("flops", "sizes", "params", "tokens", "loss", "params_interval", "fault")


def run_sweep(sweep: Sweep, scale: Scale, place: Place) -> dict[str, Any]:
    """Runs what is missing; runs and fit.

    Raises:
        OutOfTime: not every run has ended.
    """
    from nativerank.scaling.cells import plan_cells
    from nativerank.scaling.decide import decide
    from nativerank.scaling.design import Design
    from nativerank.scaling.fit import fit
    from nativerank.scaling.records import with_budgets
    from nativerank.scaling.sources import run_of

    sizes, budgets, arms = tuple(sweep.sizes), tuple(sweep.budgets), tuple(map(parse_arm, sweep.arms))
    range_ = (sweep.tokens_per_param[0], sweep.tokens_per_param[1])
    # The probed matrix is one of the scale's own model, which another size may lack.
    settings = {k: v for k, v in scale.settings.items() if k != "model.preset" and not k.startswith("train.probe")}
    design = Design(sizes, budgets, arms, "exact", seeds=scale.seeds, tokens_per_param=range_, common=settings)
    planned = {run.cell: run for run in plan_cells(design)}

    def name(cell: Cell) -> str:
        run = planned[cell]
        return f"{run.budget:.3g} FLOPs, {run.method}, {run.size}, seed {run.seed}"

    rows = place.run(list(planned), lambda cell: planned[cell].row(), name)
    runs = with_budgets([run_of(row, design, place.folder) for row in rows if "error" not in row])
    try:
        found = fit(runs)
        saving = saving_record(decide(found))
    except ValueError as error:  # no law goes through these runs, which is a result
        found, saving = {"groups": {}, "warnings": [str(error)]}, None
    groups = {label: group_record(group) for label, group in found["groups"].items()}
    return {
        "runs": [{key: row[key] for key in KEPT if key in row} for row in rows],
        "groups": groups,
        "saving": saving,
        "warnings": found["warnings"],
    }


def group_record(group: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a group's laws."""
    iso, law = group["isoflop"], group["parametric"]
    profiles = [{key: row[key] for key in PROFILE} for row in iso["profiles"]] if iso else []
    return {
        "method": group["method"],
        "rank_ratio": group["rank_ratio"],
        "isoflop": iso and {key: iso[key] for key in LAWS},
        "profiles": profiles,
        "parametric": law and {key: law[key] for key in (*LAWS, "E", "alpha", "beta")},
        "warnings": group["warnings"],
    }


def saving_record(report: dict[str, Any]) -> dict[str, Any] | None:
    """The share of parameters that low rank saves at the largest budget, and the paper's arithmetic."""
    saving = report["saving"]
    if not saving:
        return None
    paper = {key: value for key, value in saving["paper"].items() if isinstance(value, float)}
    return {"budget": report["budget"], "at_budget": saving["at_budget"], "interval": saving["interval"], **paper}
