"""A comparison: arms that train on identical data from identical dense matrices, and the cells they have run.

A cell is one arm at one point (values of the coordinates) with one seed, a run of `experiments.grid`. Budgets: "tokens"
gives every arm the same steps; "flops" gives it the total training FLOPs F of the first arm (`accounting.flops`),

    steps = round(F / (FLOPs per token * tokens per step)).
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nativerank.experiments.arms import COORDINATES, LR, ONCE, Arm, Value
from nativerank.experiments.contender import Contender, Point, measured
from nativerank.experiments.grid import Cell, run_grid

Row = dict[str, Any]
Grid = Mapping[str, Sequence[Value]]  # coordinate -> values
Runner = Callable[[list[Cell], Callable[[Cell], Row], Callable[[Cell], str]], list[Row]]


@dataclass
class Tries:
    """What one arm was seen to do: rows by point and seed."""

    rows: dict[tuple[tuple[tuple[str, float], ...], int], Row] = field(default_factory=dict)

    def add(self, point: Point, seed: int, row: Row) -> None:
        self.rows[tuple(sorted(point.items())), seed] = row

    def points(self) -> list[Point]:
        """Every point that was run, in order."""
        return [dict(key) for key in dict.fromkeys(key for key, _ in self.rows)]

    def at(self, point: Point) -> dict[int, Row]:
        """The rows of a point by seed."""
        wanted = tuple(sorted(point.items()))
        return {seed: row for (key, seed), row in sorted(self.rows.items()) if key == wanted}

    def losses(self, point: Point) -> dict[int, float]:
        """Validation losses of a point by seed; of the runs that reached their end."""
        return {seed: row["val_loss"] for seed, row in self.at(point).items() if "val_loss" in row}

    def refused_steps(self, point: Point) -> int:
        """Updates that the guard left out, over the runs of a point."""
        return sum(row.get("refused_steps") or 0 for row in self.at(point).values())

    def lack(self, point: Point) -> str | None:
        """Why a point has no loss to speak of, or None: a mean over the seeds that came through would flatter it."""
        rows = list(self.at(point).values())
        for key in ("refused", "diverged", "failed"):
            hit = sum(("error" if key == "failed" else key) in row for row in rows)
            if hit:
                return f"{key} {hit} of {len(rows)}" if key != "refused" else key
        return None if rows else "not run"

    def best(self) -> Point | None:
        """The point of lowest mean loss among those with the most finished seeds; None if nothing finished.

        A seed that diverged or failed counts against its point, so that no mean is flattered by leaving it out.
        """
        finished = [point for point in self.points() if self.losses(point)]

        def order(point: Point) -> tuple[int, float]:
            losses = self.losses(point)
            return -len(losses), math.fsum(losses.values()) / len(losses)

        return min(finished, key=order, default=None)


class Comparison:
    """Arms and what they did.

    Args:
        folder: holds results and cells.
        common: settings of every cell.
        budget: "tokens" or "flops".
        seeds: 0 .. seeds - 1.
        jobs: runs side by side.
        say: told about every cell that ends.
        runner: runs cells; another one rehearses.
    """

    def __init__(
        self,
        folder: Path,
        common: Mapping[str, Any],
        budget: str = "tokens",
        seeds: int = 1,
        jobs: int = 1,
        say: Callable[[str], None] = print,
        runner: Runner | None = None,
    ):
        self.folder, self.common, self.budget, self.seeds, self.jobs = folder, dict(common), budget, seeds, jobs
        self.runner: Runner = runner or (lambda cells, about, name: run_grid(cells, folder, jobs, say, about, name))
        self.contenders: dict[str, Contender] = {}
        self.tries: dict[str, Tries] = {}
        self.anchors: dict[str, Point] = {}  # where searches ended, which later tries do not move

    def enter(self, arms: Iterable[Arm]) -> list[str]:
        """Adds arms; returns their labels.

        Raises:
            ValueError: a configuration that cannot be, an arm with its own steps under equal FLOPs.
        """
        labels = []
        for arm in arms:
            assert arm.label not in self.contenders, f"{arm.label} is there already"
            self.contenders[arm.label] = self._contender(arm)
            self.tries[arm.label] = Tries()
            labels.append(arm.label)
        return labels

    def _contender(self, arm: Arm) -> Contender:
        settings = {**self.common, **arm.settings, "method": arm.method}
        try:
            facts = measured(json.dumps(settings, sort_keys=True))
        except ValueError as error:
            raise ValueError(f"{arm.label}: {error}") from None
        if self.budget == "flops" and self.contenders:
            own = [key for key in ("train.steps", "train.tokens") if key in arm.settings]
            if own:
                raise ValueError(f"{arm.label} sets {own[0]}, which --budget flops decides")
            first = next(iter(self.contenders.values()))
            per_step = facts["flops_per_token"] * facts["tokens_per_step"]
            facts = facts | {"steps": max(1, round(first.flops / per_step))}
        kept = {key: value for key, value in settings.items() if key not in (*COORDINATES, "train.tokens")}
        return Contender(arm, kept, **facts)

    def run(self, wanted: Iterable[tuple[str, Point, int]]) -> None:
        """Runs (label, point, seed) cells that have no result yet; of one that training would refuse, says so."""
        allowed = []
        for label, point, seed in wanted:
            if reason := self.contenders[label].refusal(point):
                self.tries[label].add(point, seed, {"refused": reason})
            else:
                allowed.append((label, point, seed))
        self._run_allowed(allowed)

    def _run_allowed(self, wanted: list[tuple[str, Point, int]]) -> None:
        cells = [self.contenders[label].cell(point, seed) for label, point, seed in wanted]
        owner: dict[str, Contender] = {}  # a cell that two arms reach is told as the first one's
        for cell, (label, _, _) in zip(cells, wanted, strict=True):
            owner.setdefault(cell.name, self.contenders[label])

        def about(cell: Cell) -> Row:
            contender = owner[cell.name]
            return {"arm": contender.arm.label, "parameters": contender.parameters, "flops": contender.flops}

        def name(cell: Cell) -> str:
            values = dict(cell.settings)
            point = [f"{key.partition('.')[2]} {values[key]:.4g}" for key in COORDINATES if key in values]
            return ", ".join([owner[cell.name].arm.label, *point, f"seed {values['train.seed']}"])

        unique = list(dict.fromkeys(cells))
        rows = dict(zip(unique, self.runner(unique, about, name), strict=True))
        for (label, point, seed), cell in zip(wanted, cells, strict=True):
            self.tries[label].add(point, seed, rows[cell])

    def run_folder(self, label: str, point: Point, seed: int) -> Path:
        """Where a cell runs."""
        return self.folder / "cells" / self.contenders[label].cell(point, seed).name

    def run_product(self, labels: Iterable[str], grid: Grid) -> None:
        """Every combination of the values, with every seed; a coordinate that the grid leaves out stays at its default.

        Raises:
            ValueError: a coordinate that an arm lacks, or absolute values for one that its brackets set.
        """
        self.run([(label, p, s) for label in labels for p in self.product(label, grid) for s in range(self.seeds)])

    def check_product(self, labels: Iterable[str], grid: Grid) -> None:
        """Raises a ValueError for the first point of a grid that training would refuse."""
        for label in labels:
            for point in self.product(label, grid):
                if reason := self.contenders[label].refusal(point):
                    raise ValueError(f"{label} at lr {point[LR]:g}: {reason}")

    def product(self, label: str, grid: Grid) -> list[Point]:
        """The points of a grid for one arm."""
        contender = self.contenders[label]
        axes = []
        for key in COORDINATES:
            values = grid.get(key, ONCE)
            if key not in contender.start:
                if values != ONCE:
                    raise ValueError(f"{key} has no meaning beside --init")
                continue
            if key in contender.arm.settings and not all(value.relative for value in values):
                raise ValueError(f"{label} sets {key} itself, so its values must be multiples such as 0.5x")
            points = dict.fromkeys(value.at(contender.start[key]) for value in values)
            axes.append([(key, value) for value in points])
        return [dict(point) for point in itertools.product(*axes)]

    def run_seeds(self, labels: Iterable[str]) -> None:
        """The remaining seeds at each arm's best point."""
        best = {label: point for label in labels if (point := self.best(label)) is not None}
        self.run([(label, p, s) for label, p in best.items() for s in range(self.seeds)])

    def best(self, label: str) -> Point | None:
        """Where the arm's search ended, if a run ended there; else its point of lowest loss."""
        anchor = self.anchors.get(label)
        return anchor if anchor and self.tries[label].losses(anchor) else self.tries[label].best()
