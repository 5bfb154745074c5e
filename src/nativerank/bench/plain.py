"""What Spectron's algebra in r x r is compared with: the forms that are published, one matrix after the other.

    Newton-Schulz on the tall matrix   five times X <- a X + (b A + c A A) X,   A = X X^T
    PlainSpectron                      that for every factor, and one power iteration for its norm

The steps of a pair are rho O_A and rho O_B, rho = lr / (||A|| + ||B|| + 1). Spectron's and Muon's authors multiply in
bfloat16 on GPUs, and so does this; on a CPU it is float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nativerank.linalg.norms import power_iteration
from nativerank.linalg.orthogonalize import MUON

MOMENTUM = 0.95


def plain_newton_schulz(M: Tensor, steps: int = 5) -> Tensor:
    """Five steps on the tall matrix itself, as published Muon code has them; in the dtype of M."""
    a, b, c = MUON
    X = M.mT if M.shape[-2] > M.shape[-1] else M
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.mT if M.shape[-2] > M.shape[-1] else X


def product_dtype(device: torch.device) -> torch.dtype:
    """What the published form multiplies in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class OneAtATime:
    """Muon without Nesterov."""

    def __init__(self, parameters: Sequence[Tensor], lr: float):
        self.parameters, self.lr = parameters, lr
        self.averages = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        for p, M in zip(self.parameters, self.averages, strict=True):
            assert p.grad is not None
            M.lerp_(p.grad, 1 - MOMENTUM)
            O = plain_newton_schulz(M)
            O *= max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
            p.add_(O, alpha=-self.lr)


class PlainSpectron:
    """Spectron as published.

    Args:
        pairs: weights of `up` (d_out, r) and `down` (r, d_in) of every layer.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], lr: float):
        self.pairs, self.lr = pairs, lr
        self.averages = [[torch.zeros_like(X) for X in tall(pair)] for pair in pairs]
        self.vectors = [[X[:, 0].detach().clone() for X in tall(pair)] for pair in pairs]

    @torch.no_grad()
    def step(self) -> None:
        for pair, averages, vectors in zip(self.pairs, self.averages, self.vectors, strict=True):
            factors, gradients = tall(pair), tall([p.grad for p in pair])
            directions, norms = [], []
            for side, (X, G, M) in enumerate(zip(factors, gradients, averages, strict=True)):
                M.lerp_(G, 1 - MOMENTUM)
                directions.append(plain_newton_schulz(M.to(product_dtype(M.device))))
                sigma, vectors[side] = power_iteration(X, vectors[side])
                norms.append(sigma)
            rho = self.lr / (norms[0] + norms[1] + 1)
            for X, O in zip(factors, directions, strict=True):
                X.sub_(rho * O)


def tall(pair: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """(A, B) of the weights, or gradients, of `up` and `down`."""
    up, down = pair
    assert up is not None and down is not None
    return up, down.mT
