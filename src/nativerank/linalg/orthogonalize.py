"""Orthogonalization of a tall matrix by an odd polynomial, run on its Gram matrix.

    M = P diag(s) Z^T   ->   O = P diag(f(s)) Z^T with f(s) near 1: the nearest semi-orthogonal matrix, roughly

An odd polynomial of M is M times a polynomial of G = M^T M. All iterations therefore run in r x r and only one tall
product M Q follows, against two tall products per step in the usual form: 2 d r^2 + O(steps r^3) + 2 d r^2 FLOPs
instead of about 6 steps d r^2. M (..., d, r), d >= r; wide matrices are transposed.

Where the singular values s of M land, for s >= 0.02 ||M||_F (smaller ones land lower, zero stays zero):
    newton-schulz, 5 steps   0.68 to 1.21   coefficients of Muon (Jordan et al. 2024)
    polar-express, 5 steps   0.85 to 1.13   coefficients of Amsel et al. 2025 (arXiv 2505.16932)
    polar-express, 7 steps   0.99 to 1.01

Rounding: G carries errors of about eps trace(G), so a rank-deficient M has slightly negative eigenvalues there, which
an aggressive polynomial magnifies without bound (1e10 was seen). A ridge of `RIDGE` eps on the normalised G keeps
them positive; then f stays bounded for every input. It lowers f by half for s near 1e-3 ||M||_F in float32 and by 1%
at 1e-2 ||M||_F. In float32 the squares in G want ||M||_F between 1e-18 and 1e18.
`orthogonalize_plain` is the textbook form in float64 and the oracle of the tests.
"""

import torch
from torch import Tensor

from nativerank.linalg.gram import Reduce, at_least_float32, full_precision, gram

Coefficients = list[tuple[float, float, float]]

MUON = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS: Coefficients = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]
SAFETY = 1.01  # shrinks all but the converged steps, as the paper does, so that rounding cannot leave the basin
RIDGE = 16.0


def coefficients(method: str, steps: int) -> Coefficients:
    """The (a, b, c) of each step X <- a X + b X (X^T X) + c X (X^T X)^2.

    Raises:
        ValueError: unknown method, or fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"orthogonalization needs at least 1 step, got {steps}")
    if method == "newton-schulz":
        return [MUON] * steps
    if method != "polar-express":
        raise ValueError(f"orthogonalizer must be newton-schulz or polar-express, got {method!r}")
    shrunk = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    converged = [(1.875, -1.25, 0.375)] * max(0, steps - len(shrunk))
    return (shrunk + converged)[:steps]


def orthogonalizing_factor(G: Tensor, method: str = "newton-schulz", steps: int = 5) -> Tensor:
    """Q (..., r, r) such that M Q is the orthogonalized M, from G = M^T M.

    A zero G gives a finite Q, so a zero M stays zero. Runs in G's dtype, float32 or float64.
    """
    eps, tiny = torch.finfo(G.dtype).eps, torch.finfo(G.dtype).tiny
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(tiny)[..., None, None]  # ||M||_F^2 bounds sigma_max^2
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    G = G / trace + RIDGE * eps * eye
    Q = trace.rsqrt() * eye
    polynomials = coefficients(method, steps)
    with full_precision(G.device):
        for step, (a, b, c) in enumerate(polynomials, start=1):
            S = a * eye + b * G + c * (G @ G)
            Q = Q @ S
            if step < len(polynomials):
                G = S @ G @ S
                G = (G + G.mT) / 2  # everything here is a polynomial of one symmetric matrix; keep it so
    return Q


def orthogonalize(M: Tensor, method: str = "newton-schulz", steps: int = 5, reduce: Reduce | None = None) -> Tensor:
    """O (..., d, r) with the singular vectors of M and singular values near 1, in M's dtype.

    Args:
        M: stack of matrices; with `reduce`, this process's rows of tall ones.
        method: "newton-schulz" or "polar-express".
        steps: iterations.
        reduce: sums Gram matrices over the processes that hold the other rows.
    """
    if M.shape[-2] < M.shape[-1]:
        if reduce:
            raise ValueError("a sharded matrix must be tall: pass its transpose")
        return orthogonalize(M.mT, method, steps).mT
    X = at_least_float32(M)
    Q = orthogonalizing_factor(gram(X, reduce), method, steps)
    with full_precision(X.device):
        return (X @ Q).to(M.dtype)


def orthogonalize_plain(M: Tensor, method: str = "newton-schulz", steps: int = 5) -> Tensor:
    """The same polynomial in float64, iterated on M itself as published: slow, explicit, the oracle."""
    if M.shape[-2] < M.shape[-1]:
        return orthogonalize_plain(M.mT, method, steps).mT
    X = M.double()
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    for a, b, c in coefficients(method, steps):
        S = X.mT @ X
        X = a * X + X @ (b * S + c * S @ S)
    return X
