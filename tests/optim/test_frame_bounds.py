"""Bounds of steps on orthonormal factors: what the retraction adds, and the certified form that measures it."""

import pytest
import torch

from nativerank.linalg.change import update_norm
from nativerank.linalg.retract import tangent
from nativerank.optim import frames
from nativerank.optim.check import DEFAULTS
from nativerank.optim.directions import Stack
from nativerank.optim.rules import RULES


def error(Q):
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max().item()


def random_frames(d_out, d_in, r, scale, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(1, d, r, generator=g, dtype=dtype)).Q for d in (d_out, d_in))
    s = scale * torch.rand(1, r, generator=g, dtype=dtype).add(0.5)
    return U, V, s, g


def options(**changes):

    return {**DEFAULTS, "initial_lr": changes.get("lr", 0.1), **changes}


def stiefel_step(way, certified, scale, eta, seed, spike=False):
    """||dW|| / eta of one step from cold momenta, with gradients that are adversarial: aligned with U and V."""
    U, V, s, g = random_frames(24, 20, 6, scale, seed)
    if spike:
        G = torch.randn(1, 24, 20, generator=g, dtype=torch.float64)
        grads = [G @ V * s[:, None], G.mT @ U * s[:, None]]
    else:
        K = torch.randn(1, 6, 6, generator=g, dtype=torch.float64)
        grads = [U @ (K - K.mT), -V @ (K - K.mT)]  # rotations inside the frames, against each other
    sides = [
        Stack(grad, {"momentum": torch.zeros_like(X)}, tuple(X.shape[-2:]), X)
        for X, grad in zip((U, V), grads, strict=True)
    ]
    state = {"exp_avg": torch.zeros_like(s), "exp_avg_sq": torch.zeros_like(s), "step": torch.zeros(1)}
    spectrum = Stack(torch.randn(1, 6, generator=g, dtype=torch.float64), state, (6,), s)
    opts = options(lr=eta, s_lr=4e-3, retraction=way, certified=certified, nesterov=False)
    new = RULES["stiefel-spectron"].update(*sides, spectrum, opts)
    U2, V2, s2 = (c.weight for c in new[:3])
    assert error(U2[0]) < 1e-10 and error(V2[0]) < 1e-10
    return (update_norm(U * s[..., None, :], V, U2 * s2[..., None, :], V2) / eta).item()


def test_retraction_breaks_the_bound_and_the_certified_form_does_not():
    cases = [
        (scale, eta, seed, spike)
        for scale in (0.3, 3, 300)
        for eta in (1e-3, 0.05, 0.8)
        for seed in range(6)
        for spike in (0, 1)
    ]
    ratios = {
        (way, certified): max(stiefel_step(way, certified, *case) for case in cases)
        for way in ("cholesky", "polar")
        for certified in (False, True)
    }
    assert ratios["cholesky", False] > 1.05, "this case would show nothing"
    assert ratios["cholesky", True] <= 1.0 and ratios["polar", True] <= 1.0
    assert stiefel_step("polar", True, 1.0, 0.05, 0) > 0.5, "a certified step must still be a step"


def test_certified_step_survives_bad_gradients():
    for bad in (float("nan"), 1e30, 0.0):
        U, V, s, _ = random_frames(8, 6, 3, 1.0, 0)
        sides = [
            Stack(torch.full_like(X, bad), {"momentum": torch.zeros_like(X)}, tuple(X.shape[-2:]), X) for X in (U, V)
        ]
        state = {"exp_avg": torch.zeros_like(s), "exp_avg_sq": torch.zeros_like(s), "step": torch.zeros(1)}
        spectrum = Stack(torch.full_like(s, bad), state, (3,), s)
        opts = options(lr=0.05, s_lr=4e-3, retraction="polar", certified=True)
        U2, V2, s2 = (c.weight for c in RULES["stiefel-spectron"].update(*sides, spectrum, opts)[:3])
        assert all(x.isfinite().all() for x in (U2, V2, s2))
        assert update_norm(U * s[..., None, :], V, U2 * s2[..., None, :], V2).item() <= 0.05


def test_tangent_part_of_an_orthonormal_step_is_at_most_2_over_sqrt_3():
    """docs/methods/stiefel-spectron.md; attained for a = 1/3, so no smaller constant would do."""
    g = torch.Generator().manual_seed(0)
    U = torch.eye(6, dtype=torch.float64)[:, :3]
    worst = 0.0
    for _ in range(300):
        O = torch.linalg.qr(torch.randn(6, 3, generator=g, dtype=torch.float64)).Q
        worst = max(worst, torch.linalg.matrix_norm(tangent(U, O), 2).item())
    assert 1.0 < worst <= 2 / 3**0.5
    # x = e_1: C x = -e_2 / 3, C^T x = e_2, the rest of the column outside span(U)
    O = torch.zeros(6, 3, dtype=torch.float64)
    O[0, 1], O[1, 0], O[3, 0] = 1.0, -1 / 3, (8 / 9) ** 0.5
    assert torch.linalg.matrix_norm(O, 2).item() <= 1 + 1e-12
    assert torch.linalg.matrix_norm(tangent(U, O), 2).item() == pytest.approx(2 / 3**0.5, rel=1e-3)


def test_root_meets_the_bound_of_frames_with_equality():
    for sigma in (1e-3, 0.5, 5.0, 50.0):
        top = torch.tensor(sigma, dtype=torch.float64)
        rho = frames.frame_rho(top, options(lr=0.5, step="root"))
        assert rho <= 1 and (sigma * (2 * rho + rho**2) == pytest.approx(0.5) or rho == 1)
        paper = frames.frame_rho(top, options(lr=0.5))
        assert sigma * (2 * paper + paper**2) <= 0.5
