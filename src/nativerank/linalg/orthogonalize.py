"""Orthogonalization of a tall matrix by an odd polynomial, run on its Gram matrix.

    M = P diag(s) Z^T   ->   O = P diag(f(s)) Z^T with f(s) near 1: the nearest semi-orthogonal matrix, roughly

An odd polynomial of M is M times a polynomial of G = M^T M: O = M Q, Q = q(G). All iterations therefore run in r x r
and M (..., d, r), d >= r, is read twice; wide matrices are transposed. FLOPs of k steps (`orthogonalize_flops`):
    here         4 d r^2 + (4 k - 3) 2 r^3        plain, on M itself         k (4 d r^2 + 2 r^3)
The same Q has two forms. Products run anywhere. On a CPU with one or two threads q is evaluated at the eigenvalues of
G from r = 128 on, which takes 0.6 to 0.8 of the time there; eigenvalue routines gain little from more cores.

Where the singular values s of M land, for s >= 0.02 ||M||_F (smaller ones land lower, zero stays zero):
    newton-schulz, 5 steps   0.68 to 1.21   coefficients of Muon (Jordan et al. 2024)
    polar-express, 5 steps   0.85 to 1.13   coefficients of Amsel et al. 2025 (arXiv 2505.16932)
    polar-express, 7 steps   0.99 to 1.01

Rounding: G carries errors of about eps trace(G), so a rank-deficient M has slightly negative eigenvalues there, which
an aggressive polynomial magnifies without bound (1e10 was seen). Where k steps can do that, a ridge of `RIDGE` eps on
the normalized G keeps them positive; then f stays bounded for every input. It lowers f by half for s near
1e-3 ||M||_F in float32 and by 1% at 1e-2 ||M||_F. Five Newton-Schulz steps need none.
In float32 the squares in G want ||M||_F between 1e-18 and 1e18.
`orthogonalize_plain` is the textbook form in float64 and the oracle of the tests.
"""

import math

import torch
from torch import Tensor

from nativerank.linalg.gram import Reduce, at_least_float32, full_precision, gram, split_finite, symmetric_product

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
RIDGE = 16.0  # in units of eps; no eigenvalue below -1 was seen (d up to 20000, r up to 512, equal columns, rank 1)
EIGEN_RANK, EIGEN_THREADS = 128, 2  # measured on a 2-core CPU, see docs/performance.md
CACHE_BYTES = 1 << 18  # of the r x r matrices that a CPU works on at a time


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

    method and steps as of `orthogonalize`. A zero G gives a finite Q, so a zero M stays zero. Runs in G's dtype,
    float32 or float64.
    """
    polynomials = coefficients(method, steps)
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(G.dtype).tiny)[..., None, None]
    few_cores = G.device.type == "cpu" and torch.get_num_threads() <= EIGEN_THREADS
    factor = factor_by_eigenvalues if few_cores and G.shape[-1] >= EIGEN_RANK else factor_by_products
    return factor(G / trace, polynomials) * trace.rsqrt()  # trace(G) = ||M||_F^2 bounds sigma_max^2


def factor_by_products(G: Tensor, polynomials: Coefficients) -> Tensor:
    """q(G) of G (..., r, r) with trace 1, by 4 products a step less 3: two in the last, S alone in the first Q.

    On a CPU a few matrices at a time, which stay in its cache from product to product.
    """
    X = G.reshape(-1, *G.shape[-2:])
    added = ridge(polynomials, X.dtype)
    if added:
        X = X + added * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    many = CACHE_BYTES // (X[:1].numel() * X.element_size()) if X.device.type == "cpu" and len(X) else len(X)
    with full_precision(X.device):
        parts = [product_of_steps(part, polynomials) for part in X.split(max(1, many))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(G.shape)


def product_of_steps(X: Tensor, polynomials: Coefficients) -> Tensor:
    """The product of all S of X (n, r, r)."""
    Q, scale = X, 1.0  # what is called X below is scale times the X of the formulas, a power of two: nothing is rounded
    for step, (a, b, c) in enumerate(polynomials):
        S = torch.baddbmm(X, X, X, beta=b / scale, alpha=c / scale**2)
        S.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = Q @ S if step else S
        if step + 1 < len(polynomials):
            X, scale = S @ X @ S, 2 * scale
            X = X + X.mT  # everything here is a polynomial of one symmetric matrix; keep it so
    return Q


def factor_by_eigenvalues(G: Tensor, polynomials: Coefficients) -> Tensor:
    """The same q(G) = V diag(q(l)) V^T; NaN where G is not finite."""
    G, finite = split_finite(G)
    values, V = torch.linalg.eigh(G.mT)  # the same matrix in LAPACK's order
    x, q = values.double().clamp_min(0) + ridge(polynomials, G.dtype), torch.ones_like(values, dtype=torch.float64)
    for a, b, c in polynomials:
        s = a + b * x + c * x.square()
        x, q = x * s.square(), q * s
    q = q.to(V.dtype).masked_fill(~finite[..., None], torch.nan)
    with full_precision(G.device):
        return symmetric_product(V * q.unsqueeze(-2), V.mT)


def ridge(polynomials: Coefficients, dtype: torch.dtype) -> float:
    """What is added to the eigenvalues of the normalized G: nothing where its rounding cannot grow to matter."""
    rounding = RIDGE * torch.finfo(dtype).eps
    growth = math.prod(a * a for a, _, _ in polynomials[:-1])  # of an eigenvalue near zero, whatever its sign
    return rounding if growth * rounding > 0.1 else 0.0


def orthogonalize_flops(d: int, r: int, steps: int = 5, plain: bool = False) -> int:
    """FLOPs to orthogonalize a (d, r) matrix by products, or in the plain form; a multiply-add counts as two.

    Elementwise work is left out. What a CPU saves by eigenvalues and by computing half of G is not subtracted.
    """
    if plain:
        return steps * (4 * d * r**2 + 2 * r**3)
    return 4 * d * r**2 + (4 * steps - 3) * 2 * r**3


def orthogonalize(M: Tensor, method: str = "newton-schulz", steps: int = 5, reduce: Reduce | None = None) -> Tensor:
    """O (..., d, r) with the singular vectors of M and singular values near 1, in M's dtype.

    Args:
        M: stack of matrices; with `reduce`, this process's rows of tall ones.
        method: "newton-schulz" or "polar-express".
        steps: iterations.
        reduce: sums Gram matrices over the processes that hold the other rows.

    Raises:
        ValueError: an unknown method, or rows of a wide matrix.
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
    """O (..., d, r) of `orthogonalize` by the same polynomial (method, steps) in float64, iterated on M itself as
    published: slow, explicit, the oracle."""
    if M.shape[-2] < M.shape[-1]:
        return orthogonalize_plain(M.mT, method, steps).mT
    X = M.double()
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    for a, b, c in coefficients(method, steps):
        S = X.mT @ X
        X = a * X + X @ (b * S + c * S @ S)
    return X
