"""Spectron's switches and the capped AdamW against transcriptions of their formulas."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nativerank.layers.lowrank import LowRankLinear
from nativerank.linalg import orthogonalize_plain
from nativerank.methods import build_optimizer
from nativerank.optim.directions import pair_rho
from nativerank.optim.optimizer import LowRankOptimizer


def factors(d_out=12, d_in=9, r=4, pairs=2, scale=1.0):
    g = torch.Generator().manual_seed(0)
    shapes = ((d_out, r), (r, d_in)) * pairs
    return [nn.Parameter(scale * torch.randn(*shape, generator=g, dtype=torch.float64)) for shape in shapes]


def set_gradients(params, step, scale=1.0):
    for i, p in enumerate(params):
        g = torch.Generator().manual_seed(100 * step + i)
        p.grad = scale * torch.randn(*p.shape, generator=g, dtype=torch.float64)


def products(params):
    return [(up @ down).detach() for up, down in zip(params[0::2], params[1::2], strict=True)]


def norms(matrices):
    return torch.stack([torch.linalg.matrix_norm(m.detach(), 2) for m in matrices])


def changes(optimizer, params, steps, scale=1.0):
    """||dW||_2 of each pair at each step."""
    found = []
    for step in range(steps):
        set_gradients(params, step, scale)
        before = products(params)
        optimizer.step()
        found += [torch.linalg.matrix_norm(b - a, 2) for a, b in zip(before, products(params), strict=True)]
    return torch.stack(found)


def test_root_meets_the_bound_with_equality_at_every_rate_and_is_longer_than_paper():
    sums = torch.tensor([0.0, 0.5, 2.0, 20.0, 600.0], dtype=torch.float64)
    for eta in (1e-3, 0.1, 1.0, 7.0):
        options = {"lr": eta, "renormalize": True}
        root, paper = (pair_rho(sums, {**options, "step": step}) for step in ("root", "paper"))
        assert_close(root.square() + root * sums, torch.full_like(sums, eta))
        assert eta > 1 or bool((root >= paper * (1 - 1e-12)).all())
    assert bool((pair_rho(sums, {"lr": 0.0, "renormalize": True, "step": "root"}) == 0).all())
    unit = {"lr": 0.05, "renormalize": True}
    two = torch.tensor(2.0)
    assert 1.4 < pair_rho(two, {**unit, "step": "root"}) / pair_rho(two, {**unit, "step": "paper"}) < 1.5


def test_without_renormalization_rho_is_the_rate():
    options = {"lr": 3.0, "renormalize": False, "step": "paper"}
    assert_close(pair_rho(torch.tensor([0.0, 5.0]), options), torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("orthogonalizer", ["newton-schulz", "none"])
@pytest.mark.parametrize("options", [{"step": "root"}, {"renormalize": False}, {}], ids=["root", "rate", "paper"])
def test_five_steps_of_every_variant_match_the_formula(orthogonalizer, options):
    params, lr, mu = factors(), 0.2, 0.9
    expected = [p.detach().clone() for p in params]
    M = [torch.zeros_like(p) for p in expected]
    group = {"rule": "spectron", "lr": lr, "momentum": mu, "norm": "exact", "orthogonalizer": orthogonalizer}
    optimizer = LowRankOptimizer([{"params": params, **group, **options}])
    for step in range(5):
        set_gradients(params, step)
        sigma = norms(expected)
        for i, p in enumerate(params):
            M[i] = mu * M[i] + (1 - mu) * p.grad
            total = sigma[i // 2 * 2] + sigma[i // 2 * 2 + 1]
            rho = {"root": (-total + (total**2 + 4 * lr) ** 0.5) / 2}.get(options.get("step"), lr / (total + 1))
            rho = rho if options.get("renormalize", True) else lr
            O = M[i] if orthogonalizer == "none" else orthogonalize_plain(M[i])
            expected[i] = expected[i] - rho * O
        optimizer.step()
    assert_close([p.detach() for p in params], expected, rtol=1e-6, atol=1e-6)


def test_the_root_step_keeps_its_bound_above_one():
    """With a polynomial whose singular values stay below 1.002 the root's proof carries it past lr = 1."""
    params = factors()
    group = {"rule": "spectron", "lr": 4.0, "step": "root", "norm": "exact", "orthogonalizer": "polar-express"}
    optimizer = LowRankOptimizer([{"params": params, **group, "orthogonalizer_steps": 8}])
    assert changes(optimizer, params, 10).max() <= 4.0 * 1.005**2


def test_muon_without_orthogonalization_is_momentum_descent():
    (p, _), lr = factors(pairs=1), 0.3
    expected, M = p.detach().clone(), torch.zeros_like(p)
    optimizer = LowRankOptimizer([{"params": [p], "rule": "muon", "lr": lr, "orthogonalizer": "none"}])
    for step in range(3):
        set_gradients([p], step)
        M = 0.95 * M + 0.05 * p.grad
        expected -= lr * M
        optimizer.step()
    assert_close(p.detach(), expected)


def test_a_cap_that_never_binds_is_adamw():
    hyper = dict(lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    capped, free = factors(pairs=3), factors(pairs=3)
    ours = LowRankOptimizer([{"params": capped, "rule": "adamw-capped", "update_cap": 1e6, **hyper}])
    reference = torch.optim.AdamW(free, **hyper)
    for step in range(5):
        for params, optimizer in ((capped, ours), (free, reference)):
            set_gradients(params, step)
            optimizer.step()
    assert_close([p.detach() for p in capped], [p.detach() for p in free])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_cap_that_binds_is_kept_and_reached(scale):
    params, cap = factors(scale=3.0), 0.01
    group = {"params": [(f"m{i // 2}.{'down' if i % 2 else 'up'}.weight", p) for i, p in enumerate(params)], "lr": 0.05}
    optimizer = LowRankOptimizer([{**group, "rule": "adamw-capped", "update_cap": cap}])
    found = changes(optimizer, params, 10, scale)
    assert found.max() <= cap and found.median() > 0.2 * cap
    assert all(0 < r["cap_factor"] < 1 for r in optimizer.records().values())


def test_the_cap_follows_the_schedule():
    params = factors(scale=3.0)
    optimizer = LowRankOptimizer([{"params": params, "rule": "adamw-capped", "lr": 0.05, "update_cap": 0.01}])
    optimizer.set_rate(0.1)
    assert changes(optimizer, params, 3).max() <= 0.001
    optimizer.set_rate(0.0)
    assert changes(optimizer, params, 1).max() == 0


def test_a_capped_pair_without_gradients_stays_and_keeps_its_age():
    params = factors(pairs=2)
    optimizer = LowRankOptimizer([{"params": params, "rule": "adamw-capped", "lr": 0.05, "update_cap": 0.01}])
    before = params[0].detach().clone()
    for step in range(2):
        set_gradients(params, step)
        params[1].grad = None
        optimizer.step()
    assert torch.equal(params[0], before)
    assert [optimizer.state[p]["step"].item() for p in params] == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "spectron", "lr": 1.5}, "must be at most 1"),
        ({"rule": "spectron", "step": "long"}, r"optim\.step must be one of paper, root, got 'long'"),
        ({"rule": "adamw", "orthogonalizer": "none"}, "orthogonalizer none has no meaning for the update rule adamw"),
        ({"rule": "muon", "step": "root"}, "step root has no meaning for the update rule muon"),
        ({"rule": "spectron", "betas": (0.5, 0.5)}, "betas .* has no meaning for the update rule spectron"),
        ({"rule": "spectron", "certified": True, "renormalize": False}, "certified chooses rho"),
        ({"rule": "spectron", "update_cap": 0.1}, "update_cap 0.1 has no meaning for the update rule spectron"),
        ({"rule": "adamw-capped"}, r"optim\.update_cap must be a positive number, got None"),
        ({"rule": "adamw-capped", "update_cap": -1.0}, "got -1.0"),
    ],
)
def test_contradictions_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankOptimizer([{"params": factors(), **options}])


@pytest.mark.parametrize(
    "options", [{"step": "root"}, {"certified": True}, {"renormalize": False}, {"orthogonalizer": "none"}]
)
def test_rates_above_one_where_the_proof_does_not_need_less(options):
    LowRankOptimizer([{"params": factors(), "rule": "spectron", "lr": 1.5, **options}])


def test_the_cap_belongs_to_naive_adamw():
    model = nn.Sequential(LowRankLinear(6, 5, 2), LowRankLinear(5, 6, 2))
    optimizer = build_optimizer(model, "lowrank-adamw", update_cap=0.1)
    assert optimizer.param_groups[0]["rule"] == "adamw-capped"
    assert build_optimizer(model, "lowrank-adamw").param_groups[0]["rule"] == "adamw"
    with pytest.raises(ValueError, match=r"update_cap 0\.1 has no meaning for the update rule spectron"):
        build_optimizer(model, "spectron", update_cap=0.1)


def test_options_of_the_auxiliary_group_reach_it_and_foreign_ones_are_refused():
    model = nn.Sequential(LowRankLinear(6, 5, 2), nn.LayerNorm(5), LowRankLinear(5, 6, 2))
    matrices, auxiliary = build_optimizer(model, "spectron", betas=(0.8, 0.9), eps=1e-6).param_groups
    assert (auxiliary["betas"], auxiliary["eps"]) == ((0.8, 0.9), 1e-6) and matrices["betas"] == (0.9, 0.95)
    with pytest.raises(ValueError, match=r"optim\.nesterov True has no meaning for the update rule adamw"):
        build_optimizer(model, "lowrank-adamw", nesterov=True)


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-20, 1e18])
def test_certified_steps_along_tiny_and_huge_raw_momenta_stay_finite(scale):
    params = [nn.Parameter(p.detach().float()) for p in factors()]
    group = {"rule": "spectron", "certified": True, "orthogonalizer": "none", "lr": 0.1}
    optimizer = LowRankOptimizer([{"params": params, **group}])
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, scale)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)
    change = [a @ b - c @ d for a, b, c, d in zip(params[::2], params[1::2], before[::2], before[1::2], strict=True)]
    assert norms(change).max() <= 0.1 * (1 + 1e-5)  # the stored factors are rounded to float32


def named(params):
    return [(f"m{i // 2}.{'down' if i % 2 else 'up'}.weight", p) for i, p in enumerate(params)]


def test_records_are_those_of_the_last_step_and_of_who_moved():
    params = factors(pairs=3)
    optimizer = LowRankOptimizer([{"params": named(params), "rule": "spectron", "lr": 0.1}])
    assert optimizer.records() == {}
    set_gradients(params, 0)
    params[2].grad = None
    optimizer.step()
    assert set(optimizer.records()) == {"m0", "m2"}
    alone = LowRankOptimizer([{"params": named(factors(pairs=3))[4:], "rule": "spectron", "lr": 0.1, "norm": "exact"}])
    set_gradients([p for g in alone.param_groups for p in g["params"]], 0)
    alone.step()
    assert alone.records()["m2"]["sigma_A"] >= optimizer.records()["m2"]["sigma_A"] > 0
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.records() == {}


@pytest.mark.parametrize("nesterov", [False, True])
def test_adam_muon_orthogonalizes_adamws_direction(nesterov):
    """One factor at a time, in float64: moments, quotient, textbook orthogonalization, the scale of its shape."""
    params, lr = factors(pairs=1), 0.03
    optimizer = LowRankOptimizer(
        [{"params": params, "rule": "adam-muon", "lr": lr, "nesterov": nesterov, "shape_scale": "match_rms_adamw"}]
    )
    expected = [params[0].detach().clone(), params[1].detach().mT.clone()]
    T = torch.randn(12, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    m, v = ([torch.zeros_like(X) for X in expected] for _ in range(2))
    for step in range(1, 7):
        optimizer.zero_grad()
        (torch.tanh(params[0] @ params[1]) - T).square().sum().backward()
        grads = [params[0].grad.clone(), params[1].grad.mT.clone()]
        optimizer.step()
        for i, G in enumerate(grads):
            m[i], v[i] = 0.9 * m[i] + 0.1 * G, 0.95 * v[i] + 0.05 * G.square()
            mean, age = (0.1 * G + 0.9 * m[i], step + 1) if nesterov else (m[i], step)
            D = mean / (1 - 0.9**age) / ((v[i] / (1 - 0.95**step)).sqrt() + 1e-8)
            expected[i] = expected[i] - lr * 0.2 * max(D.shape) ** 0.5 * orthogonalize_plain(D)
        assert_close(params[0].detach(), expected[0], rtol=1e-7, atol=1e-9)
        assert_close(params[1].detach().mT, expected[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_adam_muon_stays_within_its_cap_at_any_rate(share):
    """And is shortened by no more than that needs: ||dW|| of a capped step is near the cap, which follows the rate."""
    for lr in (0.001, 0.3, 30.0):
        params = factors(pairs=1, scale=3.0)
        optimizer = LowRankOptimizer([{"params": params, "rule": "adam-muon", "lr": lr, "update_cap": 0.1}])
        optimizer.set_rate(share)
        for _ in range(10):
            before = (params[0] @ params[1]).detach().clone()
            optimizer.zero_grad()
            (params[0] @ params[1]).square().sum().backward()
            optimizer.step()
            change = torch.linalg.matrix_norm((params[0] @ params[1]).detach() - before, 2).item()
            assert change <= 0.1 * share
            assert lr < 0.3 or change > 0.02 * share
