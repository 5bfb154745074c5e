"""The law with rank as its third axis, and the ratio that compute is best spent at.

    L(N, D, rho) = E + A / N_eff^alpha + B / D^beta
    N_eff = N exp(gamma x + kappa x^2),  x = log(rho / rho_ref)        rho_ref: geometric mean of the ratios

rho = r / d_in, N the parameters that the model really has. This form, because E belongs to the text and B, beta to
its length, which no rank changes; what a rank changes is how much a parameter is worth. With gamma alone it is the
power law N_eff = N rho^gamma, and the same as a prefactor A(rho) = A rho^(-alpha gamma): one law, not two. A power
law has its best ratio at an end of the range whatever the data say, while sweeps report one inside (0.4 better than
0.25 better than 0.125, and dense no better): the square in log rho is the least that can have one, at log(rho* /
rho_ref) = -gamma / (2 kappa) for kappa < 0 where FLOPs are 6 N D. It is a local law, as an IsoFLOP parabola is:
nothing is claimed outside of the ratios that ran. In logs all of it is linear (`law`): log A - alpha n - g x - k x^2,
gamma = g / alpha, kappa = k / alpha.

Exact FLOPs make thin models dearer than 6 N D says: at equal N they are wider, so head and attention cost more. In a
family of fixed shape, width d grows as (N / rho)^(1/3); the head costs ~ d, attention over all layers ~ d^2, so per
token

    c(N, rho) = c0 N + c1 (N / rho)^(1/3) + c2 (N / rho)^(2/3)        c >= 0, fitted to the FLOPs of the runs

and the best (N, rho) of a budget C minimises L(N, C / c(N, rho), rho) over sizes and the ratios that ran.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from nativerank.scaling.law import Array, Law, linear_starts
from nativerank.scaling.parametric import EXPONENTS, Parametric, check
from nativerank.scaling.records import Run

Cost = Callable[[Array, Array], Array]  # params, rank_ratio -> training FLOPs per token

LEAST_RATIOS = 3
LEAST_RUNS = 9
GAMMAS = (-0.5, 0.0, 0.5)
STARTS = 8
GRID, ZOOMS = 25, 8
NEAR_END = 0.01  # in log rho


@dataclass(frozen=True)
class Surface:
    """The constants of the law; fields may hold one number each, or (S, 1, 1) of as many resamples."""

    E: Any
    A: Any
    B: Any
    alpha: Any
    beta: Any
    gamma: Any
    kappa: Any
    rho_ref: float

    def effective_params(self, params: Array | float, rank_ratio: Array | float) -> Array:
        """N_eff."""
        x = np.log(np.asarray(rank_ratio) / self.rho_ref)
        return np.asarray(params * np.exp(self.gamma * x + self.kappa * x**2))

    def loss(self, params: Array | float, tokens: Array | float, rank_ratio: Array | float) -> Array:
        """In nats per token."""
        size = self.effective_params(params, rank_ratio)
        return np.asarray(self.E + self.A * size**-self.alpha + self.B * np.asarray(tokens) ** -self.beta)

    def at(self, rank_ratio: float) -> Parametric:
        """The law of models of one ratio."""
        worth = float(self.effective_params(1.0, rank_ratio))
        return Parametric(self.E, float(self.A * worth**-self.alpha), self.B, self.alpha, self.beta)

    def as_dict(self) -> dict[str, float]:
        """The constants."""
        return asdict(self)


@dataclass(frozen=True)
class SurfaceProblem:
    """Runs as the law sees them, with what leads back to their units."""

    law: Law
    centre: tuple[float, float]
    rho_ref: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "SurfaceProblem":
        """Raises a ValueError where runs cannot tell seven constants."""
        ratios = np.array([run.rank_ratio or np.nan for run in runs])
        if np.isnan(ratios).any():
            raise ValueError("the law with rank needs the rank_ratio of every run")
        if len(runs) < LEAST_RUNS or len(set(ratios)) < LEAST_RATIOS:
            raise ValueError(
                f"the law with rank needs {LEAST_RUNS} runs and {LEAST_RATIOS} rank ratios, "
                f"got {len(runs)} and {len(set(ratios))}"
            )
        check(runs)
        n, d = (np.log([getattr(run, name) for run in runs]) for name in ("params", "tokens"))
        rho_ref = float(np.exp(np.mean(np.log(sorted(set(ratios))))))
        x, ones, centre = np.log(ratios / rho_ref), np.ones_like(n), (float(n.mean()), float(d.mean()))
        size = np.stack([ones, centre[0] - n, -x, -(x**2)], 1)
        features = (ones[:, None], size, np.stack([ones, centre[1] - d], 1))
        return cls(Law(features, np.log([run.loss for run in runs])), centre, rho_ref)

    def fit(self) -> Array:
        """theta = (e, a, alpha, g, k, b, beta)."""
        law = self.law
        points = np.array([[p, p * g, 0.0, q] for p, q, g in product(EXPONENTS, EXPONENTS, GAMMAS)])
        starts = linear_starts(law.features, np.exp(law.log_loss), points)
        best = starts[np.argsort(law.objective(starts), kind="stable")[:STARTS]]
        return law.refine(law.minimize(best), np.ones((1, len(law.log_loss))))[0]

    def constants(self, theta: Array) -> Surface:
        """In the units of the runs: numbers for theta (7,), columns (S, 1, 1) for (S, 7)."""
        e, a, alpha, g, k, b, beta = theta if theta.ndim == 1 else theta.T[:, :, None, None]
        with np.errstate(over="ignore"):
            A, B = np.exp(a + alpha * self.centre[0]), np.exp(b + beta * self.centre[1])
        found = (np.exp(e), A, B, alpha, beta, g / alpha, k / alpha)
        E, A, B, alpha, beta, gamma, kappa = found if theta.ndim > 1 else map(float, found)
        return Surface(E, A, B, alpha, beta, gamma, kappa, self.rho_ref)


@dataclass(frozen=True)
class FamilyCost:
    """FLOPs of training per token in a family of fixed shape.

    Attributes:
        matrices, head, attention: c0, c1, c2. error: largest relative error on the runs that it was fitted to.
    """

    matrices: float
    head: float
    attention: float
    error: float = 0.0

    def __call__(self, params: Array, rank_ratio: Array) -> Array:
        twin = params / rank_ratio
        return np.asarray(self.matrices * params + self.head * twin ** (1 / 3) + self.attention * twin ** (2 / 3))


def fit_cost(runs: Sequence[Run]) -> FamilyCost:
    """The cost of these runs, each of which has a rank ratio."""
    from scipy.optimize import nnls

    params, ratios = (np.array([getattr(run, name) for run in runs]) for name in ("params", "rank_ratio"))
    per_token = np.array([run.flops / run.tokens for run in runs])
    twin = params / ratios
    design = np.stack([params, twin ** (1 / 3), twin ** (2 / 3)], 1) / per_token[:, None]
    scale = design.max(0)
    found, _ = nnls(design / scale, np.ones_like(per_token))
    c0, c1, c2 = found / scale
    return FamilyCost(float(c0), float(c1), float(c2), error=float(np.abs(design @ (found / scale) - 1).max()))


def fit_twin_cost(runs: Sequence[Mapping[str, Any]]) -> Callable[[Array], Array]:
    """Training FLOPs per token of models of one rank ratio, or of dense ones, by their size.

    Args:
        runs: with params, tokens, flops.
    """
    plain = [Run(run["params"], run["tokens"], run["flops"], 1.0, 1.0) for run in runs]
    cost = fit_cost(plain)
    return lambda params: cost(params, np.ones(()))


def best_shapes(surface: Surface, flops: float, cost: Cost, low: float, high: float) -> dict[str, Array]:
    """Size and ratio of the lowest loss at a budget, for each set of constants (1,) or (S,).

    Args:
        flops: C. cost: of a token. low, high: the ratios to choose from.

    Returns:
        params, tokens, rank_ratio, loss. The search zooms in on a grid of both logs, to 1e-4 in log N.
    """
    count = np.size(surface.E)
    axis = np.linspace(-1, 1, GRID)
    # From 1e-3 to 1e7 tokens per parameter at 6 N D, in logs.
    top, bottom = np.log(flops / 6e-3) / 2, np.log(flops / 6e7) / 2
    middle = np.tile([(top + bottom) / 2, np.log(low * high) / 2], (count, 1))
    half = np.array([(top - bottom) / 2, np.log(high / low) / 2])
    ends = np.log([low, high])
    for _ in range(ZOOMS):
        n = (middle[:, :1] + half[0] * axis)[:, :, None]  # (S, GRID, 1)
        x = np.clip(middle[:, 1:] + half[1] * axis, *ends)[:, None, :]  # (S, 1, GRID)
        params, ratio = np.exp(n), np.exp(x)
        tokens = flops / cost(params, ratio)
        with np.errstate(all="ignore"):  # constants of a resample may be wild
            loss = np.nan_to_num(surface.loss(params, tokens, ratio), nan=np.inf)  # (S, GRID, GRID)
        flat = loss.reshape(count, -1).argmin(1)
        rows, columns, which = flat // GRID, flat % GRID, np.arange(count)
        middle = np.stack([n[which, rows, 0], x[which, 0, columns]], 1)
        half = half / 3
    params, ratio = np.exp(middle).T
    return {"params": params, "tokens": flops / cost(params, ratio), "rank_ratio": ratio, "loss": loss.min((1, 2))}


def is_inside(rank_ratio: float, low: float, high: float) -> bool:
    """Whether a best ratio lies between those that ran, not at an end of them."""
    return bool(np.log(rank_ratio / low) > NEAR_END and np.log(high / rank_ratio) > NEAR_END)
