"""The promise ||dW||_2 <= eta of certified Spectron, where the published form breaks it."""

import pytest
import torch

from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.rules import RULES, Stack

D_OUT, D_IN, R, ETA = 96, 64, 16, 0.1


def frame(d, r, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, generator=g, dtype=torch.float64)).Q


def factors(kind, size, seed=0):
    """Adversarial pairs (A, B) with ||A|| = ||B|| = size."""
    spectra = {
        "flat": torch.ones(R),
        "spike": torch.tensor([1.0] + [1e-3] * (R - 1)),
        "rank one": torch.tensor([1.0] + [0.0] * (R - 1)),
        "condition 1e6": torch.logspace(0, -6, R),
    }
    s = size * spectra[kind].double()
    return frame(D_OUT, R, seed) * s, frame(D_IN, R, seed + 1) * s


def gradients(kind, A, B, scale, seed=0):
    """Gradients whose orthogonalization is as bad as can be for these factors."""
    if kind == "aligned":  # every term of dW points the same way
        return scale * A, scale * B
    if kind == "top only":
        a, b = A[:, :1] / A[:, :1].norm(), B[:, :1] / B[:, :1].norm()
        e = torch.eye(R, dtype=A.dtype)[:1]
        return scale * a @ e, scale * b @ e
    if kind == "rank deficient":
        G = torch.randn(D_OUT, R, generator=torch.Generator().manual_seed(seed), dtype=A.dtype)
        G[:, R // 2 :] = 0
        return scale * G, scale * torch.ones(D_IN, R, dtype=A.dtype)
    assert kind == "zero"
    return torch.zeros_like(A), torch.zeros_like(B)


def change(A, B, G_A, G_B, certified, dtype, u=None, **options):
    """||dW||_2 in float64 of one step from zero momentum; the power vector is cold unless given."""
    group = {"lr": ETA, "momentum": 0.95, "nesterov": False, "shape_scale": "none", "norm": "power"}
    group |= {"orthogonalizer": "newton-schulz", "orthogonalizer_steps": 5, "power_iterations": 1}
    group |= {"certified": certified, "step": "paper", "renormalize": True, **options}
    stacks = []
    for i, (X, G) in enumerate(((A, G_A), (B, G_B))):
        cold = torch.randn(len(X), generator=torch.Generator().manual_seed(5 + i), dtype=dtype) if u is None else u[i]
        state = {
            "momentum": torch.zeros_like(X, dtype=dtype)[None],
            "power_vector": (cold / cold.norm())[None].to(dtype),
        }
        stacks.append(Stack(X[None].to(dtype), G[None].to(dtype), state, (len(X), R)))
    D_A, D_B, record = RULES["spectron"].update(*stacks, group)
    A, B = (s.weight[0].double() for s in stacks)
    D_A, D_B = D_A[0].double(), D_B[0].double()
    assert torch.isfinite(D_A).all() and torch.isfinite(D_B).all() and torch.isfinite(record["rho"]).all()
    return torch.linalg.matrix_norm((A - D_A) @ (B - D_B).T - A @ B.T, 2).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["flat", "spike", "rank one", "condition 1e6"])
@pytest.mark.parametrize("direction", ["aligned", "top only", "rank deficient", "zero"])
def test_the_bound_holds_on_adversarial_factors_and_gradients(dtype, kind, direction):
    for size in (0.3, 1.0, 5.0, 30.0, 300.0):
        for scale in (1e-12, 1.0, 1e12):
            A, B = factors(kind, size)
            G_A, G_B = gradients(direction, A, B, scale)
            assert change(A, B, G_A, G_B, True, dtype) <= ETA
            assert change(-A, B, G_A, G_B, True, dtype) <= ETA


@pytest.mark.parametrize(
    "options",
    [
        {"orthogonalizer": "polar-express", "orthogonalizer_steps": 9},
        {"nesterov": True},
        {"shape_scale": "original"},
        {"shape_scale": "match_rms_adamw"},
        {"lr": 25.0},
    ],
)
def test_the_bound_holds_for_any_orthogonalizer_scale_and_eta(options):
    for kind in ("flat", "spike"):
        A, B = factors(kind, 7.0)
        eta = options.get("lr", ETA)
        assert change(A, B, *gradients("aligned", -A, B, 1.0), True, torch.float32, **options) <= eta


@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_zero_factors_move_within_the_bound(zero):
    A, B = factors("flat", 2.0)
    G_A, G_B = gradients("aligned", A, B, 1.0)
    A, B = (0 * A if zero in ("A", "both") else A), (0 * B if zero in ("B", "both") else B)
    assert 0 < change(A, B, G_A, G_B, True, torch.float32) <= ETA


def test_the_bound_is_not_slack_where_nothing_is_wasted():
    """Aligned top directions: the root uses the whole of eta, so certified is not just small."""
    A, B = factors("flat", 5.0)
    assert change(A, B, *gradients("aligned", -A, -B, 1.0), True, torch.float64) >= 0.95 * ETA


def test_the_published_form_breaks_it_there():
    """With exact norms by Newton-Schulz overshoot, with a stale power vector by far more."""
    A, B = factors("flat", 100.0)
    ratios = []
    for seed in range(20):  # singular values of the momentum decide how far Newton-Schulz overshoots
        g = torch.Generator().manual_seed(seed)
        mix = torch.diag(0.05 + torch.rand(R, generator=g, dtype=torch.float64))
        ratios.append(change(A, B, -A @ mix, -B @ mix, False, torch.float64, norm="exact") / ETA)
    assert 1.05 < max(ratios) < 1.25
    A, B = factors("spike", 5.0)
    stale = [X[:, 1] / X[:, 1].norm() for X in (A, B)]  # points at a direction that has become unimportant
    assert change(A, B, *gradients("aligned", -A, -B, 1.0), False, torch.float64, u=stale) / ETA > 1.5
    assert change(A, B, *gradients("aligned", -A, -B, 1.0), True, torch.float64, u=stale) <= ETA


def test_certified_training_of_a_pair_stays_within_the_bound():
    A, B = factors("flat", 1.0)
    up, down = torch.nn.Parameter(A.clone()), torch.nn.Parameter(B.mT.clone())
    T = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer = LowRankOptimizer([{"params": [up, down], "rule": "spectron", "lr": 2.0, "certified": True}])
    losses = []
    for _ in range(60):
        before = (up @ down).detach()
        optimizer.zero_grad()
        loss = (up @ down - 5 * T).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert torch.linalg.matrix_norm((up @ down).detach() - before, 2) <= 2.0
    assert losses[-1] < 0.8 * losses[0]


def test_certified_belongs_to_spectron():
    p = torch.nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match="certified belongs to the rule spectron, got muon"):
        LowRankOptimizer([{"params": [p], "rule": "muon", "certified": True}])
