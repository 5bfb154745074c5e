"""Fewer points of a long curve, without hiding anything: of every stretch its minimum and its maximum stay.

A curve of n values is cut into equal stretches; kept are the first and the last value, and of each stretch the lowest
and the highest finite one, at their places. So a spike of one step among 200,000 is drawn at its height, and nothing is
drawn that was not measured. The median curve beside it is another thing, and called so.
"""

from itertools import pairwise

import numpy as np

POINTS = 1600  # of a curve of one run
MEDIANS = 200


def extremes(values: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Indices (k,) of the values (n,) that are kept, ascending, k <= points; all of them where n <= points."""
    n = len(values)
    if n <= points:
        return np.arange(n)
    bounds = stretches(n, max(1, (points - 2) // 2))
    finite = np.isfinite(values)
    lowest, highest = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    kept = {0, n - 1}
    for low, high in pairwise(bounds):
        if finite[low:high].any():
            kept |= {low + int(lowest[low:high].argmin()), low + int(highest[low:high].argmax())}
    return np.array(sorted(kept))


def medians(x: np.ndarray, values: np.ndarray, points: int = MEDIANS) -> tuple[np.ndarray, np.ndarray]:
    """(last x, median of the finite values) of at most `points` stretches; none of those without a finite value."""
    bounds = stretches(len(values), min(points, len(values)))
    found = []
    for low, high in pairwise(bounds):
        part = values[low:high]
        if np.isfinite(part).any():
            found.append((x[high - 1], float(np.median(part[np.isfinite(part)]))))
    return np.array([a for a, _ in found]), np.array([b for _, b in found])


def stretches(n: int, count: int) -> list[int]:
    """Bounds of `count` stretches of n values, as equal as can be."""
    return [n * i // count for i in range(count + 1)] if count else [0]


def short(values: np.ndarray) -> list[float | None]:
    """Numbers for JSON: six digits, null for what is not finite."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values.tolist()]
