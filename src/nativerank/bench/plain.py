"""What Spectron's algebra in r x r is compared with: the forms that are published.

    Newton-Schulz on the tall matrix   five times X <- a X + (b A + c A A) X,   A = X X^T
    PlainSpectron                      that for every factor, and one power iteration for its norm

The steps of a pair are rho O_A and rho O_B, rho = lr / (||A|| + ||B|| + 1). Spectron's and Muon's authors multiply in
bfloat16 on GPUs, and so does this; on a CPU it is float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nativerank.linalg.norms import power_iteration
from nativerank.linalg.orthogonalize import MUON

MOMENTUM = 0.95
Pair = tuple[Tensor, Tensor]


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
        stacked: layers of equal shape as one batch, instead of one after the other.
    """

    def __init__(self, pairs: Sequence[Pair], lr: float, stacked: bool = False):
        groups: dict[Any, list[Pair]] = {}
        for index, (up, down) in enumerate(pairs):
            groups.setdefault((up.shape, down.shape) if stacked else index, []).append((up, down))
        self.groups, self.lr = list(groups.values()), lr
        self.averages = [[torch.zeros_like(X) for X in stacks(group)] for group in self.groups]
        self.vectors = [[X[..., 0] for X in stacks(group)] for group in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        for group, averages, vectors in zip(self.groups, self.averages, self.vectors, strict=True):
            gradients = stacks([(up.grad, down.grad) for up, down in group])
            directions, norms = [], []
            for side, (X, G, M) in enumerate(zip(stacks(group), gradients, averages, strict=True)):
                M.lerp_(G, 1 - MOMENTUM)
                directions.append(plain_newton_schulz(M.to(product_dtype(M.device))))
                sigma, vectors[side] = power_iteration(X, vectors[side])
                norms.append(sigma)
            rho = self.lr / (norms[0] + norms[1] + 1)
            O_A, O_B = ((rho[:, None, None] * O).unbind() for O in directions)
            torch._foreach_sub_([up for up, _ in group], list(O_A))
            torch._foreach_sub_([down for _, down in group], [O.mT for O in O_B])


def stacks(group: Sequence[tuple[Tensor | None, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """A (n, d_out, r) and B (n, d_in, r) of weights, or gradients, of equal shape."""
    up = torch.stack([up.detach() for up, _ in group if up is not None])
    down = torch.stack([down.detach().mT for _, down in group if down is not None])
    return up, down
