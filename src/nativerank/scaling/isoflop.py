"""IsoFLOP profiles: at each budget the size of lowest loss, and how it grows with compute.

    at a budget C     loss = c0 + c1 u + c2 u^2,  u = log N        minimum at u* = -c1 / (2 c2), if c2 > 0
    over budgets      N_opt = a C^alpha,  D_opt = b C^beta         straight lines in logs, each budget counts the same

(Hoffmann et al. 2022, approach 2.) D_opt is where log D, a smooth function of log N at one budget, stands at the
minimum: C / (6 N) if FLOPs are 6 N D, and what the runs say if they are counted otherwise. A parabola is what a
smooth loss looks like near its minimum: sizes far from it, or a grid that is not centred on it, pull the minimum to
one side. A budget takes part in the power laws with 3 sizes or more and a minimum among them.

Resamples of the runs are weights, so that all of them are fitted at once: (S, 3, 3) systems per budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nativerank.scaling.law import Array
from nativerank.scaling.records import Run

LEAST_SIZES = 3
LEAST_BUDGETS = 2


@dataclass(frozen=True)
class Budget:
    """The runs of one budget.

    Attributes:
        flops: C. members: places of its runs, (n,). log_params, log_tokens, loss: of these, (n,).
    """

    flops: float
    members: NDArray[np.int64]
    log_params: Array
    log_tokens: Array
    loss: Array

    @property
    def sizes(self) -> int:
        """How many different models it has."""
        return len(np.unique(self.log_params))

    @property
    def frame(self) -> tuple[float, float]:
        """Middle and half width of log N."""
        low, high = self.log_params.min(), self.log_params.max()
        return float(low + high) / 2, float(high - low) / 2

    def design(self) -> Array:
        """Columns 1, v, v^2, (n, 3), with v from -1 to 1 over the sizes."""
        middle, half = self.frame
        return np.vander((self.log_params - middle) / half, 3, increasing=True)

    def coefficients(self, weights: Array) -> Array:
        """Parabolas in v, (S, 3), by least squares with weights (S, n) that hold 3 sizes or more."""
        X = self.design()
        gram = np.einsum("sn,ni,nj->sij", weights, X, X)
        right = np.einsum("sn,ni,n->si", weights, X, self.loss)
        return np.asarray(np.linalg.solve(gram, right[..., None])[..., 0], dtype=np.float64)

    def minima(self, weights: Array) -> tuple[Array, Array]:
        """log N of the lowest loss and that loss, (S,) each; NaN where a parabola has no minimum.

        One that lies further out than the sizes are wide is as good as none, and stands at that distance.
        """
        c0, c1, c2 = self.coefficients(weights).T
        middle, half = self.frame
        with np.errstate(divide="ignore", invalid="ignore"):
            v = np.where(c2 > 0, np.clip(-c1 / (2 * c2), -3, 3), np.nan)
        return middle + half * v, c0 + c1 * v + c2 * v**2

    def tokens_at(self, log_params: Array) -> Array:
        """log D of models of these sizes at this budget."""
        middle, half = self.frame
        degree = min(2, self.sizes - 1)
        curve = np.polynomial.polynomial.polyfit((self.log_params - middle) / half, self.log_tokens, degree)
        return np.asarray(np.polynomial.polynomial.polyval((log_params - middle) / half, curve), dtype=np.float64)

    def scatter(self) -> tuple[float, int]:
        """Sum of squared residuals about the parabola, and how many runs it has beyond its three coefficients."""
        weights = np.ones((1, len(self.loss)))
        return float(((self.loss - self.design() @ self.coefficients(weights)[0]) ** 2).sum()), len(self.loss) - 3

    def minimum_variance(self) -> float:
        """Of log N at the minimum, for losses of variance 1, to first order."""
        X, (_, c1, c2) = self.design(), self.coefficients(np.ones((1, len(self.loss))))[0]
        slope = np.array([0, -1 / (2 * c2), c1 / (2 * c2**2)])  # of the minimum in the coefficients
        return float(slope @ np.linalg.solve(X.T @ X, slope)) * self.frame[1] ** 2

    def standard_error(self) -> float | None:
        """Of log N at the minimum; None with 3 runs, which leave no scatter."""
        squares, free = self.scatter()
        return float(np.sqrt(squares / free * self.minimum_variance())) if free > 0 else None


@dataclass(frozen=True)
class Profile:
    """A budget's parabola.

    Attributes:
        flops: C. sizes: different N. params, tokens, loss: at the minimum; None where there is none.
        params_error: standard error of log N there, relative therefore; None where it cannot be known.
        used: it takes part in the power laws. fault: why it does not.
    """

    flops: float
    sizes: int
    params: float | None
    tokens: float | None
    loss: float | None
    params_error: float | None
    fault: str | None

    @property
    def used(self) -> bool:
        return self.fault is None


def budgets_of(runs: Sequence[Run]) -> list[Budget]:
    """Runs by budget, the smallest first."""
    by_budget: dict[float, list[int]] = {}
    for place, run in enumerate(runs):
        assert run.budget is not None
        by_budget.setdefault(run.budget, []).append(place)
    out = []
    for flops, places in sorted(by_budget.items()):
        members = [runs[place] for place in places]
        logs = (np.log([run.params for run in members]), np.log([run.tokens for run in members]))
        out.append(Budget(flops, np.array(places), *logs, np.array([run.loss for run in members])))
    return out


def profile(budget: Budget) -> Profile:
    """A budget's parabola, and whether it can be trusted."""
    if budget.sizes < LEAST_SIZES:
        fault = f"fewer than {LEAST_SIZES} sizes ({budget.sizes})"
        return Profile(budget.flops, budget.sizes, None, None, None, None, fault)
    log_params, loss = budget.minima(np.ones((1, len(budget.loss))))
    if not np.isfinite(log_params[0]):
        fault = "the loss has no minimum in model size, its parabola opens downward"
        return Profile(budget.flops, budget.sizes, None, None, None, None, fault)
    low, high = budget.log_params.min(), budget.log_params.max()
    outside = None
    if log_params[0] < low:
        outside = f"the minimum lies outside the grid, below the smallest model ({np.exp(low):.3g})"
    elif log_params[0] > high:
        outside = f"the minimum lies outside the grid, above the largest model ({np.exp(high):.3g})"
    tokens = float(np.exp(budget.tokens_at(log_params)[0]))
    params, error = float(np.exp(log_params[0])), budget.standard_error()
    return Profile(budget.flops, budget.sizes, params, tokens, float(loss[0]), error, outside)


def usable(budgets: Sequence[Budget]) -> list[Budget]:
    """The budgets that the power laws go through.

    Raises:
        ValueError: fewer than two.
    """
    profiles = [profile(budget) for budget in budgets]
    good = [budget for budget, found in zip(budgets, profiles, strict=True) if found.used]
    if len(good) < LEAST_BUDGETS:
        faults = "; ".join(f"{p.flops:.3g} FLOPs: {p.fault}" for p in profiles if p.fault) or "there is one budget"
        raise ValueError(
            f"IsoFLOP profiles need {LEAST_BUDGETS} budgets with a minimum each, got {len(good)}: {faults}"
        )
    return good


def minima(budgets: Sequence[Budget], weights: Array) -> tuple[Array, Array]:
    """log N and log D of the lowest loss per resample and budget, (S, K) each.

    Args:
        weights: of all runs, (S, R).
    """
    log_params = np.stack([budget.minima(weights[:, budget.members])[0] for budget in budgets], axis=1)
    log_tokens = np.stack([budget.tokens_at(log_params[:, k]) for k, budget in enumerate(budgets)], axis=1)
    return log_params, log_tokens


def power_law(log_flops: Array, values: Array, keep: Array | None = None) -> tuple[Array, Array]:
    """Lines through `values` (S, K) over log C (K,): at log C = 0 and slope, (S,) each; a NaN drops out of its line.

    Args:
        keep: which values take part, (S, K); None for all.
    """
    there = np.isfinite(values) if keep is None else np.isfinite(values) & keep
    count = there.sum(1)
    safe = np.where(there, values, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        x_mean, y_mean = (there * log_flops).sum(1) / count, safe.sum(1) / count
        x = np.where(there, log_flops - x_mean[:, None], 0.0)
        slope = np.where(count >= LEAST_BUDGETS, (x * safe).sum(1) / (x**2).sum(1), np.nan)
        return y_mean - slope * x_mean, slope
