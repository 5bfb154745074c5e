"""Runs on their way through the fits: how they are fitted, which are left out, what has to be said."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np

from nativerank.scaling.bootstrap import LEVEL, resamples
from nativerank.scaling.isoflop import Budget
from nativerank.scaling.law import Array, Law
from nativerank.scaling.records import Run

Approach = Literal["isoflop", "parametric", "surface"]
APPROACHES: tuple[Approach, ...] = get_args(Approach)

SAMPLES = 1000
FAR_ABOVE = 0.1  # in log loss, and
FAR_SCATTERS = 10
STEEP = 5.0  # an exponent that only a term which is gone after the first few runs has
NEGLIGIBLE = 0.01  # of the lowest loss: an E of which nothing is seen
WIDE = 3.0  # high / low of an interval above which a constant is not determined


class Problem(Protocol):
    """A law and its fit."""

    @property
    def law(self) -> Law: ...

    def fit(self) -> Array: ...

    def constants(self, theta: Array) -> Any: ...


P = TypeVar("P", bound=Problem)


@dataclass(frozen=True)
class Options:
    """How to fit.

    Args:
        approaches: what to fit, an error where the runs do not suffice for it; None is all, where one that they do not
            suffice for is a warning as long as another one is left.
        samples: resamples for intervals. seed: of their draw. level: what intervals shall cover.
    """

    approaches: Sequence[Approach] | None = None
    samples: int = SAMPLES
    seed: int = 0
    level: float = LEVEL

    def __post_init__(self) -> None:
        unknown = [name for name in self.wanted if name not in APPROACHES]
        if unknown or not self.wanted:
            raise ValueError(f"approaches are {' and '.join(APPROACHES)}, got {', '.join(unknown) or 'none'}")
        if len(set(self.wanted)) < len(self.wanted):
            raise ValueError(f"approaches names one twice: {', '.join(self.wanted)}")
        if self.samples < 10:
            raise ValueError(f"intervals need 10 resamples or more, got {self.samples}")
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {self.level}")

    @property
    def wanted(self) -> Sequence[Approach]:
        """What to fit."""
        return APPROACHES if self.approaches is None else self.approaches


@dataclass
class Sweep:
    """Runs of one group on their way through the fits."""

    runs: list[Run]
    options: Options
    left_out: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, runs: Sequence[Run], options: Options) -> "Sweep":
        """These runs, without those that have no loss."""
        sweep = cls(list(runs), options)
        sweep.leave_out([run for run in runs if run.loss == math.inf], "it diverged")
        return sweep

    def leave_out(self, gone: Sequence[Run], reason: str) -> None:
        """Takes runs out, and says so."""
        for run in gone:
            self.left_out.append({"source": run.source, "reason": reason})
            name = run.source or f"the run of {run.params:.3g} parameters at {run.budget:.3g} FLOPs"
            self.warnings.append(f"{name} is left out: {reason}")
        dropped = {id(run) for run in gone}
        self.runs = [run for run in self.runs if id(run) not in dropped]

    def weights(self, budgets: Sequence[Budget]) -> Array:
        """Its resamples."""
        return resamples(budgets, len(self.runs), self.options.samples, self.options.seed)


def settled(sweep: Sweep, problem_of: Callable[[Sequence[Run]], P]) -> tuple[P, Array]:
    """A law of the sweep's runs and its parameters, without runs whose loss no scatter explains.

    Raises:
        ValueError: the runs are too few, or their losses follow no such law.
    """
    problem = problem_of(sweep.runs)
    theta = problem.fit()
    residual = problem.law.log_loss - problem.law.predict(theta)
    far = residual > max(FAR_ABOVE, FAR_SCATTERS * scatter(residual))
    if far.any():
        gone = [run for run, above in zip(sweep.runs, far, strict=True) if above]
        sweep.leave_out(gone, "its loss lies far above the law of the others, as if it had diverged")
        problem = problem_of(sweep.runs)
        theta = problem.fit()
    check_constants(problem.constants(theta).as_dict())
    return problem, theta


def check_constants(constants: dict[str, float]) -> None:
    """Raises a ValueError for constants that no losses of models have."""
    for name in ("alpha", "beta"):
        if not 0 < constants[name] < STEEP:
            what = {"alpha": "params", "beta": "tokens"}[name]
            raise ValueError(
                f"the losses do not fall with {what} as the law says: it would need {name} = {constants[name]:.3g}"
            )
    for name, value in constants.items():
        if not math.isfinite(value) or (name in "AB" and value <= 0):
            raise ValueError(f"the losses follow no such law: it would need {name} = {value:.3g}")


def scatter(residual: Array) -> float:
    """Standard deviation, as the median of a normal distribution has it."""
    return float(1.4826 * np.median(np.abs(residual)))


def warn_undetermined(sweep: Sweep, constants: dict[str, float], spans: dict[str, list[float] | None]) -> None:
    """Says which constants of the law these runs leave open."""
    for name in ("E", "alpha", "beta"):
        low, high = spans[name] or (0.0, np.inf)
        gone = name == "E" and constants[name] < NEGLIGIBLE * min(run.loss for run in sweep.runs)
        if gone or constants[name] <= 0 or low <= 0 or high > WIDE * low:
            sweep.warnings.append(
                f"{name} = {constants[name]:.3g} is not determined by these runs ({low:.3g} to {high:.3g})"
            )
