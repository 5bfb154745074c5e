"""The parametric law of losses: what a model of N parameters learns from D tokens.

    L(N, D) = E + A / N^alpha + B / D^beta        log L = logsumexp(e, a - alpha n, b - beta d),  n = log N, d = log D

(Hoffmann et al. 2022, approach 3; how it is fitted: `law`). n and d are measured from their means, so that prefactors
and exponents hardly depend on each other and units do not matter. Starts: a grid of exponents; the prefactors of each
follow by linear least squares, as the law is linear in them, which leaves two dimensions to search instead of five.

At C = 6 N D the best model is N = G (C / 6)^(beta / (alpha + beta)), D = (C / 6)^(alpha / (alpha + beta)) / G,
G = (alpha A / (beta B))^(1 / (alpha + beta)).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np

from nativerank.scaling.law import Array, Law, linear_starts
from nativerank.scaling.records import Run

NAMES = ("E", "A", "B", "alpha", "beta")
EXPONENTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2)
STARTS = 12  # of the grid's points the best, from which L-BFGS goes on
LEAST_RUNS = len(NAMES) + 1


@dataclass(frozen=True)
class Parametric:
    """The constants of the law."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def n_exponent(self) -> float:
        """Of compute in the best model's parameters, at C = 6 N D."""
        return self.beta / (self.alpha + self.beta)

    @property
    def d_exponent(self) -> float:
        """Of compute in the best model's tokens, at C = 6 N D."""
        return self.alpha / (self.alpha + self.beta)

    def loss(self, params: Array | float, tokens: Array | float) -> Array:
        """In nats per token."""
        return np.asarray(self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -self.beta))

    def best_params(self, flops: Array | float) -> Array:
        """N of the lowest loss at C = 6 N D."""
        with np.errstate(all="ignore"):  # constants of a resample may be such that there is none: NaN
            ratio = np.log(np.float64(self.alpha)) + np.log(self.A) - np.log(np.float64(self.beta)) - np.log(self.B)
            log_params = (ratio + self.beta * np.log(np.asarray(flops) / 6)) / (self.alpha + self.beta)
            return np.asarray(np.exp(log_params))

    def as_dict(self) -> dict[str, float]:
        """The constants, and the exponents that follow."""
        return asdict(self) | {"n_exponent": self.n_exponent, "d_exponent": self.d_exponent}


@dataclass(frozen=True)
class Problem:
    """Runs as the law sees them, with what leads back to their units: means of log N and log D."""

    law: Law
    centre: tuple[float, float]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Problem":
        """Raises a ValueError where runs cannot tell five constants."""
        check(runs)
        n, d = (np.log([getattr(run, name) for run in runs]) for name in ("params", "tokens"))
        ones, centre = np.ones_like(n), (float(n.mean()), float(d.mean()))
        features = (ones[:, None], np.stack([ones, centre[0] - n], 1), np.stack([ones, centre[1] - d], 1))
        return cls(Law(features, np.log([run.loss for run in runs])), centre)

    def fit(self) -> Array:
        """theta = (e, a, alpha, b, beta), a and b at the centre."""
        law = self.law
        points = np.array(list(product(EXPONENTS, EXPONENTS)))
        starts = linear_starts(law.features, np.exp(law.log_loss), points)
        best = starts[np.argsort(law.objective(starts), kind="stable")[:STARTS]]
        return law.refine(law.minimize(best), np.ones((1, len(law.log_loss))))[0]

    def constants(self, theta: Array) -> Parametric:
        """In the units of the runs."""
        e, a, alpha, b, beta = map(float, theta)
        with np.errstate(over="ignore"):
            A, B = np.exp(a + alpha * self.centre[0]), np.exp(b + beta * self.centre[1])
        return Parametric(float(np.exp(e)), float(A), float(B), alpha, beta)

    def predict(self, theta: Array, runs: Sequence[Run]) -> Array:
        """Log losses of other runs, in the units of these."""
        fitted = self.constants(theta)
        return np.log(fitted.loss(np.array([r.params for r in runs]), np.array([r.tokens for r in runs])))


def check(runs: Sequence[Run]) -> None:
    """Raises a ValueError where runs cannot tell five constants."""
    if len(runs) < LEAST_RUNS:
        raise ValueError(f"the parametric law has {len(NAMES)} constants and needs {LEAST_RUNS} runs, got {len(runs)}")
    for name in ("params", "tokens"):
        if len({getattr(run, name) for run in runs}) < 3:
            raise ValueError(f"the parametric law needs runs with at least 3 different {name}")


def fit_parametric(runs: Sequence[Run]) -> Parametric:
    """The law of these runs, each with a finite loss.

    Raises:
        ValueError: there are too few of them, or too few sizes.
    """
    problem = Problem.of(runs)
    return problem.constants(problem.fit())
