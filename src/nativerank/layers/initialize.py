"""Where factors start: the truncated SVD of a dense initialisation, or a sample with the same law.

    svd        W = std N(0, 1);  W ~ P S Q^T;  A = P_r sqrt(S_r), B = Q_r sqrt(S_r)     one transient dense matrix
    sampled    P_r, Q_r Haar-distributed frames, S_r the spectrum that W would have     no dense matrix anywhere
    flat       the same frames, all S_r equal and ||S_r|| = std sqrt(d_in d_out), the Frobenius norm of the whole W

flat is SCT's random start (arXiv 2604.00733) with the norm that it names; its published script is too small by a factor
sqrt(d_in).

A Gaussian W has Haar singular vectors that are independent of its singular values, and those hardly fluctuate: with
n = max(d), m = min(d), beta = m / n the values sigma / (std sqrt(n)) follow the Marchenko-Pastur law

    p(s) = sqrt((s^2 - a^2)(b^2 - s^2)) / (pi beta s)   on [a, b] = [1 - sqrt(beta), 1 + sqrt(beta)]

so `sampled` takes its r upper quantiles, a number per shape and not a random draw. Balanced factors (sqrt(S) on both
sides) start with equal norms. Every matrix has its own generator, seeded by its name: adding or removing one module
changes no other, and dense and low-rank runs start from the same matrices.
Cost: svd O(d_in d_out min(d)), sampled O((d_in + d_out) r^2).
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from nativerank.linalg.truncate import decompose

GRID_POINTS = 1 << 16  # of the Marchenko-Pastur distribution function; the quantile error is far below 1 / min(d)


def init_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the parameter `name` of a run: stable over machines, versions, the order of modules."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter; on the CPU because its numbers must not depend on the device."""
    return torch.Generator("cpu").manual_seed(init_seed(seed, name))


def dense_init(name: str, d_out: int, d_in: int, std: float, seed: int) -> Tensor:
    """The iid normal float32 matrix W (d_out, d_in) that any method starts the named matrix from.

    Args:
        name: of the matrix in its model. std: of the entries. seed: of the run; with the name it fixes every number.
    """
    return torch.randn(d_out, d_in, generator=named_generator(seed, name)).mul_(std)


def truncated_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation A B^T of W (d_out, d_in), balanced: A (d_out, r), B (d_in, r), at least float32.

    Equal input gives equal factors on any LAPACK.

    Raises:
        ValueError: the rank lies outside [1, min(d_in, d_out)], or W is not finite.
    """
    if not torch.isfinite(W).all():
        raise ValueError(f"cannot factorize a weight of shape {tuple(W.shape)} that holds NaN or infinity")
    A, B = decompose(W).factors(rank)
    dtype = torch.promote_types(W.dtype, torch.float32)
    return A.to(W.device, dtype), B.to(W.device, dtype)


def gaussian_spectrum(d_in: int, d_out: int, rank: int, std: float) -> Tensor:
    """The `rank` largest singular values (r,) of a (d_out, d_in) matrix of iid entries with standard deviation `std`:
    Marchenko-Pastur quantiles.

    The i-th of m values stands at probability (i - 1/2) / m. With s = 1 - sqrt(beta) cos(theta) the law becomes
    sin^2(theta) sqrt((s + a)(s + b)) / (pi s) dtheta, which is smooth on (0, pi) for square matrices too.
    """
    m, n = sorted((d_in, d_out))
    root_beta = math.sqrt(m / n)
    theta = (torch.arange(GRID_POINTS, dtype=torch.float64) + 0.5) * (math.pi / GRID_POINTS)
    s = 1 - root_beta * theta.cos()
    density = theta.sin().square() * ((s + 1 - root_beta) * (s + 1 + root_beta)).sqrt() / s
    above = density.flip(0).cumsum(0)  # mass from the top, theta descending from pi
    above = above / above[-1]
    wanted = (torch.arange(rank, dtype=torch.float64) + 0.5) / m
    index = torch.searchsorted(above, wanted).clamp(max=GRID_POINTS - 1)
    return s.flip(0)[index] * (std * math.sqrt(n))


def haar_frame(d: int, rank: int, generator: torch.Generator | None, device: torch.device | None = None) -> Tensor:
    """A uniformly distributed (d, r) matrix with orthonormal columns: the QR of a Gaussian with diag(R) > 0.

    Without the sign fix LAPACK's own convention decides and the result is not Haar (Mezzadri 2007, math-ph/0609050).
    """
    Q, R = torch.linalg.qr(torch.randn(d, rank, generator=generator).to(device or "cpu"))
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def sampled_factors(
    d_in: int,
    d_out: int,
    rank: int,
    std: float,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    flat: bool = False,
) -> tuple[Tensor, Tensor]:
    """Factors A (d_out, r), B (d_in, r) with the law of `truncated_svd` of a Gaussian matrix, no dense matrix formed.

    rank is r, std the standard deviation of the Gaussian matrix.

    Numbers are drawn on the CPU (by torch's global generator if none is given), the QR runs on `device`. With `flat`
    all singular values are equal and W has the Frobenius norm of the Gaussian matrix before truncation.
    """
    P, Q = haar_frame(d_out, rank, generator, device), haar_frame(d_in, rank, generator, device)
    equal = torch.full((rank,), std * math.sqrt(d_in * d_out / rank))
    root = (equal if flat else gaussian_spectrum(d_in, d_out, rank, std)).sqrt().to(P)
    return P * root, Q * root


def initial_factors(
    name: str,
    d_in: int,
    d_out: int,
    rank: int,
    std: float,
    seed: int,
    init: str = "svd",
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The starting factors of the named matrix, the same on every machine and in every model that has the name."""
    if init == "svd":
        return truncated_svd(dense_init(name, d_out, d_in, std, seed).to(device or "cpu"), rank)
    if init in ("sampled", "flat"):
        return sampled_factors(d_in, d_out, rank, std, named_generator(seed, name), device, init == "flat")
    raise ValueError(f"unknown initialisation {init!r}; known: svd, sampled, flat")


@torch.no_grad()
def init_factor_layer(layer: Any, name: str, std: float, seed: int, init: str = "svd") -> None:
    """Starts a factor layer in place as W with iid entries of the given std would be truncated.

    Args:
        layer: `LowRankLinear`, or a stack such as `LowRankExperts`, whose expert e starts as matrix "{name}.{e}".
        name: full name of the matrix in the model; seeds the numbers.
        std: standard deviation of the dense initialisation, before truncation.
        seed: of the run.
        init: "svd", "sampled" or "flat". A dense guide starts as the matrix that "svd" truncates.
    """
    A, *_, B = layer.factors()
    shape = (B.shape[-2], A.shape[-2], layer.rank, std, seed, init, A.device)
    if A.ndim == 2:
        layer.fill(*initial_factors(name, *shape))
        if getattr(layer, "wants_dense", False):
            layer.fill_guide(dense_init(name, A.shape[-2], B.shape[-2], std, seed))
        return
    for expert in range(A.shape[0]):
        layer.fill(*initial_factors(f"{name}.{expert}", *shape), expert=expert)
