"""Spectral norms of tall matrices X (..., d, r): exactly from the Gram matrix, or by warm-started power iteration.

    exact    sigma_max = sqrt(lambda_max(X^T X))      2 d r^2 + O(r^3) FLOPs
    power    v = X^T u, u <- X v, normalised           (2 + 4 k) d r FLOPs for k iterations; never above the truth

Power iteration needs a direction u (d) kept from step to step: cold it is wrong by up to 30x on a spiked spectrum,
warm by a few percent, because X moves little in one step.
"""

import torch
from torch import Tensor

from nativerank.linalg.gram import Reduce, at_least_float32, full_precision, gram, split_finite


def spectral_norm(X: Tensor, reduce: Reduce | None = None) -> Tensor:
    """sigma_max (...) of X (..., d, r), exact up to rounding (relative error r eps); NaN where X is not finite.

    `reduce` as in `gram`.

    Raises:
        ValueError: rows of a wide matrix.
    """
    if X.shape[-2] < X.shape[-1]:
        if reduce:
            raise ValueError("a sharded matrix must be tall: pass its transpose")
        X = X.mT
    return gram_norm(gram(X, reduce))


def gram_norm(G: Tensor) -> Tensor:
    """sigma_max (...) of X from G = X^T X (..., r, r); NaN where G is not finite."""
    G, finite = split_finite(G)
    on_host = G.cpu() if G.device.type == "mps" else G  # MPS has no eigenvalues
    sigma = torch.linalg.eigvalsh(on_host)[..., -1].clamp_min(0).sqrt().to(G.device)
    return sigma.masked_fill(~finite, torch.nan)


def power_iteration(X: Tensor, u: Tensor, steps: int = 1, reduce: Reduce | None = None) -> tuple[Tensor, Tensor]:
    """(sigma, u): an estimate of sigma_max (...) and the left vector (..., d) to start from next time.

    Spectron's Algorithm 3 (arXiv 2602.12429): v = X^T u, then `steps` times u = X v, v = X^T u, all normalised,
    sigma = u^T X v. Where X is zero, sigma is 0 and u is kept, so that nothing becomes NaN and the direction is
    there when X is not zero any more.

    Args:
        X: stack of tall matrices, or this process's rows of it.
        u: unit vectors, or this process's entries of them.
        steps: iterations, at least 1.
        reduce: sums (..., r) vectors and (...) squares over the processes that hold the other rows.
    """
    total = reduce or (lambda t: t)
    X = at_least_float32(X)
    w = u.to(X.dtype).unsqueeze(-2)  # rows (..., 1, d): a batch of them times matrices is 10 times as fast as columns
    with full_precision(X.device):
        v = _normalised(total(w @ X))
        for _ in range(steps):
            Xv = v @ X.mT
            length = total(Xv.square().sum((-2, -1), keepdim=True)).sqrt()
            w = torch.where(length > 0, Xv / length.clamp_min(_tiny(X)), w)
            Xw = total(w @ X)
            v = _normalised(Xw)
    sigma = (Xw * v).sum((-2, -1))  # u^T X v
    return sigma, w.squeeze(-2).to(u.dtype)


def gram_power_iteration(G: Tensor, start: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """(sigma, c) of the same iteration for who has only G = X^T X (..., r, r) and start = X^T u (..., r).

    The left vector to start from next time is X c; where c (..., r) is zero, so was X u, and u stays.
    """
    w, v, c = start, _normalised(start), torch.zeros_like(start)
    with full_precision(G.device):
        for _ in range(steps):
            Gv = (v.unsqueeze(-2) @ G).squeeze(-2)
            length = (v * Gv).sum(-1, keepdim=True).clamp_min(0).sqrt()  # ||X v||
            c = torch.where(length > 0, v / length.clamp_min(_tiny(G)), 0.0)
            w = torch.where(length > 0, Gv / length.clamp_min(_tiny(G)), w)
            v = _normalised(w)
    return (w * v).sum(-1), c


def power_iteration_flops(d: int, r: int, steps: int = 1) -> int:
    """FLOPs of the products of `power_iteration` on a (d, r) matrix; a multiply-add counts as two."""
    return (1 + 2 * steps) * 2 * d * r


def _normalised(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_tiny(x))


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
