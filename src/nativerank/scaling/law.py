"""Losses as a sum of exponentials of linear terms, fitted robustly: what `parametric` and `surface` have in common.

    log L_i = log sum_t exp(F_t[i] . theta_t)          one block of theta for each term t, features F_t: (runs, block)
    objective = sum_i w_i huber((log L_i - log L_i observed) / delta)       huber(z) = z^2/2, or |z| - 1/2 beyond 1

Residuals in log loss with delta = 1e-3 are those of Hoffmann et al. (2022, arXiv 2203.15556, approach 3); their sum,
not the mean, as Besiroglu et al. (2024, arXiv 2404.10102) found that a small objective ends the search early. For the
same reason residuals are divided by delta here, which moves no minimum and keeps the objective away from the
tolerances.

The first fit is L-BFGS from many starts (`minimize`), one after the other. What comes after it starts at that fit and
is many small problems that differ in the weights w alone, so all of them go side by side through damped Gauss-Newton
steps on the reweighted residuals (`refine`): S problems with R runs and P parameters cost S R P^2 a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DELTA = 1e-3
STEPS = 200
DAMPING = 1e-3  # of the first step, relative to the diagonal
SETTLED = 1e-10  # relative gain of the objective below which a problem is done


@dataclass(frozen=True)
class Law:
    """Runs as a law sees them.

    Attributes:
        features: per term (R, block). log_loss: (R,), as observed.
    """

    features: tuple[Array, ...]
    log_loss: Array

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(f.shape[1] for f in self.features)

    def log_terms(self, theta: Array) -> Array:
        """Logs of the terms, (..., R, T), for parameters (..., P)."""
        blocks = np.split(theta, np.cumsum([f.shape[1] for f in self.features])[:-1], axis=-1)
        return np.stack([block @ f.T for block, f in zip(blocks, self.features, strict=True)], axis=-1)

    def predict(self, theta: Array) -> Array:
        """Log losses, (..., R)."""
        return logsumexp(self.log_terms(theta))

    def linearized(self, theta: Array) -> tuple[Array, Array]:
        """Log losses (..., R) and their derivatives (..., R, P)."""
        terms = self.log_terms(theta)
        predicted = logsumexp(terms)
        shares = np.exp(terms - predicted[..., None])  # of each term in the loss, (..., R, T)
        jacobian = [shares[..., t, None] * f for t, f in enumerate(self.features)]
        return predicted, np.concatenate(jacobian, axis=-1)

    def objective(self, theta: Array, weights: Array | float = 1.0) -> Array:
        """The sum of Huber losses, (...), for weights (..., R)."""
        return (weights * huber((self.predict(theta) - self.log_loss) / DELTA)).sum(-1)

    def value_and_gradient(self, theta: Array, weights: Array | float = 1.0) -> tuple[float, Array]:
        """Of the objective at one point: a number and (P,)."""
        predicted, jacobian = self.linearized(theta)
        z = (predicted - self.log_loss) / DELTA
        return float((weights * huber(z)).sum()), (weights * np.clip(z, -1, 1)) @ jacobian / DELTA

    def minimize(self, starts: Array) -> Array:
        """The best end, (P,), of L-BFGS from each start (S, P)."""
        from scipy.optimize import minimize

        options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-12, "gtol": 1e-8, "maxcor": 20}
        ends = [
            minimize(self.value_and_gradient, start, jac=True, method="L-BFGS-B", options=options) for start in starts
        ]
        return np.asarray(min(ends, key=lambda end: end.fun).x)

    def refine(self, start: Array, weights: Array) -> Array:
        """Minima (S, P) near `start`, (P,) or (S, P), for each row of weights (S, R)."""
        theta = np.broadcast_to(start, (len(weights), self.size)).copy()
        value, damping = self.objective(theta, weights), np.full(len(weights), DAMPING)
        active = np.arange(len(weights))
        for _ in range(STEPS):
            step = self._step(theta[active], weights[active], damping[active])
            tried = theta[active] + step
            found = self.objective(tried, weights[active])
            better = found < value[active]
            gain = np.where(better, value[active] - found, np.inf)
            done = (gain <= SETTLED * value[active]) | (damping[active] > 1e8)
            damping[active] = np.where(better, np.maximum(damping[active] / 5, 1e-12), damping[active] * 4)
            moved = active[better]
            theta[moved], value[moved] = tried[better], found[better]
            active = active[~done]
            if not len(active):
                break
        return theta

    def _step(self, theta: Array, weights: Array, damping: Array) -> Array:
        """Damped Gauss-Newton steps (S, P); a residual beyond delta counts delta / |residual| as much."""
        predicted, jacobian = self.linearized(theta)
        z = (predicted - self.log_loss) / DELTA
        curvature = weights / np.maximum(np.abs(z), 1)
        pull = -((curvature * z)[:, None, :] @ jacobian)[:, 0, :] / DELTA
        hessian = jacobian.swapaxes(1, 2) @ (curvature[..., None] * jacobian) / DELTA**2
        diagonal = np.einsum("sii->si", hessian)
        floor = 1e-12 * diagonal.max(-1, keepdims=True) + 1e-300
        diagonal += damping[:, None] * np.maximum(diagonal, floor)  # a view: this damps the Hessian itself
        diagonal += floor
        return np.asarray(np.linalg.solve(hessian, pull[..., None])[..., 0], dtype=np.float64)


def huber(z: Array) -> Array:
    """z^2 / 2 up to 1, |z| - 1/2 beyond."""
    size = np.abs(z)
    return np.where(size <= 1, 0.5 * z * z, size - 0.5)


def logsumexp(terms: Array) -> Array:
    """Over the last axis, safe for any size of the terms."""
    top = terms.max(-1)
    return top + np.log(np.exp(terms - top[..., None]).sum(-1))


def linear_starts(features: Sequence[Array], loss: Array, exponents: Array) -> Array:
    """Positive prefactors of the terms for fixed exponents: least squares on relative residuals.

    Args:
        features: as of `Law`; the first column of each is ones, the others take `exponents`.
        loss: (R,), not its log. exponents: (S, P - T), in the order of the columns.

    Returns:
        Parameters (S, P).
    """
    from scipy.optimize import nnls

    starts = []
    for point in exponents:
        parts = np.split(point, np.cumsum([f.shape[1] - 1 for f in features])[:-1])
        design = np.stack([np.exp(f[:, 1:] @ part) for f, part in zip(features, parts, strict=True)], axis=1)
        scale, _ = nnls(design / loss[:, None], np.ones_like(loss))
        logs = np.log(np.maximum(scale, 1e-3 * loss.min() / design.max(0)))  # a term at 0 could never come back
        starts.append(np.concatenate([np.r_[log, part] for log, part in zip(logs, parts, strict=True)]))
    return np.stack(starts)
