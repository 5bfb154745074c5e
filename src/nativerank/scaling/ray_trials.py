"""The cells of a sweep as trials of Ray Tune, on one machine or a cluster that sees one folder.

Every trial is `nativerank scaling run --out DIR --cell I` in a process of its own, so a cell has the same name, run
folder and result as in a local sweep or a job array; what has run is not run again, whoever ran it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nativerank.experiments.results import outcome, outcomes
from nativerank.extras import require


def run_trials(
    numbers: Sequence[int],
    names: Sequence[str],
    folder: Path,
    resources: Mapping[str, float],
    say: Callable[[str], None],
) -> None:
    """Runs cells as trials; their rows stand in the folder's results-*.jsonl afterwards.

    Args:
        numbers, names: of the cells to run. folder: of the sweep, which every node sees.
        resources: {"cpu", "gpu"} of a trial.
        say: told about every trial that ends.

    Raises:
        ValueError: the extra `ray` is not installed.
    """
    ray = require("ray", "ray", "--ray")
    tune = require("ray.tune", "ray", "--ray")
    name_of = dict(zip(numbers, names, strict=True))
    began_here = not ray.is_initialized()
    if began_here:  # RAY_ADDRESS names a cluster; without it this machine is one
        ray.init(log_to_driver=False, include_dashboard=False)

    callback: Any = tune.Callback

    class Told(callback):
        """Says what became of a trial when it ends."""

        def __init__(self, tell: Callable[[int], None] | None = None) -> None:
            self.tell = tell

        def __getstate__(self) -> dict[str, Any]:
            return {"tell": None}  # Ray keeps a copy in its own record of the experiment

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if self.tell:
                self.tell(trial.config["cell"])

    def tell(number: int) -> None:
        row = outcomes(folder).get(name_of[number], {"error": "it left no result"})
        say(f"cell {number} ({name_of[number]}): {outcome(row)}")

    try:
        tune.Tuner(
            tune.with_resources(trial_of(folder), dict(resources)),
            param_space={"cell": tune.grid_search(list(numbers))},
            run_config=tune.RunConfig(
                name="ray", storage_path=str(folder.resolve()), callbacks=[Told(tell)], verbose=0
            ),
        ).fit()
    finally:
        if began_here:
            ray.shutdown()


def trial_of(folder: Path) -> Callable[[dict[str, Any]], dict[str, float]]:
    """What Ray runs: one cell, as a job array would."""
    where = str(folder.resolve())

    def trial(config: dict[str, Any]) -> dict[str, float]:
        command = [sys.executable, "-m", "nativerank", "scaling", "run", "--out", where, "--cell", str(config["cell"])]
        done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, env=dict(os.environ))
        return {"exit_code": float(done.returncode)}  # why is a row of the results

    return trial
