"""Each rule against a float64 transcription of its formula and against torch's own optimizers."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nativerank.linalg import orthogonalize_plain
from nativerank.optim.optimizer import LowRankOptimizer


def problem(sizes, seed=0, dtype=torch.float64):
    """Parameters and a loss under which they interact, so that gradients change from step to step."""
    g = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(*size, generator=g, dtype=dtype)) for size in sizes]
    targets = [torch.randn(*size, generator=g, dtype=dtype) for size in sizes]

    def loss():
        return sum(((p.sin() - t) ** 2).sum() for p, t in zip(params, targets, strict=True))

    return params, loss


def pair_problem(d_out=7, d_in=5, r=3, pairs=2, seed=0):
    """Factors up (d_out, r), down (r, d_in) with loss |up down - T|^2 / 2; the targets hang on the loss."""
    g = torch.Generator().manual_seed(seed)
    factors = [
        nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64))
        for _ in range(pairs)
        for shape in ((d_out, r), (r, d_in))
    ]
    targets = [torch.randn(d_out, d_in, generator=g, dtype=torch.float64) for _ in range(pairs)]

    def loss():
        products = zip(factors[0::2], factors[1::2], targets, strict=True)
        return sum((up @ down - T).square().sum() / 2 for up, down, T in products)

    loss.targets = targets
    return factors, loss


def run(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        before = [p.grad.clone() for g in optimizer.param_groups for p in g["params"]]
        optimizer.step()
        after = [p.grad for g in optimizer.param_groups for p in g["params"]]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "a step must not write gradients"


def spectron_oracle(factors, u, steps, lr, beta, nesterov=False, weight_decay=0.0, exact=False):
    """Algorithm 1 and nothing else: explicit gradients, one matrix at a time, textbook orthogonalization."""
    ups, downs, T = factors
    M = [[torch.zeros_like(A), torch.zeros_like(B)] for A, B in zip(ups, downs, strict=True)]
    for _ in range(steps):
        for i, (A, Bt) in enumerate(zip(ups, downs, strict=True)):
            R = A @ Bt - T[i]
            directions, sigmas = [], []
            for j, (X, G) in enumerate([(A, R @ Bt.T), (Bt.T, R.T @ A)]):
                M_j = M[i][j] if j == 0 else M[i][j].T
                M_j = beta * M_j + (1 - beta) * G
                M[i][j] = M_j if j == 0 else M_j.T
                directions.append(orthogonalize_plain((1 - beta) * G + beta * M_j if nesterov else M_j))
                if exact:
                    sigmas.append(torch.linalg.matrix_norm(X, 2))
                    continue
                v = X.T @ u[i][j]
                u[i][j] = X @ v / (X @ v).norm()
                v = X.T @ u[i][j]
                sigmas.append(u[i][j] @ X @ v / v.norm())
            rho = lr / (sigmas[0] + sigmas[1] + 1)
            decay = 1 - lr * weight_decay
            ups[i], downs[i] = decay * A - rho * directions[0], decay * Bt - rho * directions[1].T
    return [x for pair in zip(ups, downs, strict=True) for x in pair]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("norm", ["power", "exact"])
def test_spectron_five_steps_match_the_oracle(nesterov, weight_decay, norm):
    factors, loss = pair_problem()
    options = dict(rule="spectron", lr=0.3, nesterov=nesterov, weight_decay=weight_decay, norm=norm)
    optimizer = LowRankOptimizer([{"params": factors, **options}])
    u = [[optimizer.state[p]["power_vector"].clone().double() for p in factors[i : i + 2]] for i in (0, 2)]
    start = [p.detach().clone() for p in factors]
    expected = spectron_oracle(
        (start[0::2], start[1::2], loss.targets), u, 5, 0.3, 0.95, nesterov, weight_decay, exact=norm == "exact"
    )
    run(optimizer, loss, 5)
    # 1e-6: the ridge of the Gram-space iteration, magnified by five steps.
    assert_close([p.detach() for p in factors], expected, rtol=1e-6, atol=1e-6)


def test_spectron_keeps_its_bound_in_training():
    """||dW|| <= lr at every step of a run that starts from moderate factors (the worst case is another matter)."""
    factors, loss = pair_problem(d_out=40, d_in=30, r=6)
    optimizer = LowRankOptimizer([{"params": factors, "rule": "spectron", "lr": 0.2, "norm": "exact"}])
    for _ in range(30):
        before = [(a @ b).detach() for a, b in zip(factors[0::2], factors[1::2], strict=True)]
        run(optimizer, loss, 1)
        for W, a, b in zip(before, factors[0::2], factors[1::2], strict=True):
            assert torch.linalg.matrix_norm((a @ b).detach() - W, 2) <= 0.2 * (1 + 1e-9)


@pytest.mark.parametrize("zero", [0, 1])
def test_spectron_moves_a_zero_factor_without_nan(zero):
    factors, loss = pair_problem()
    with torch.no_grad():
        factors[zero].zero_()
    optimizer = LowRankOptimizer([{"params": factors, "rule": "spectron", "lr": 0.1}])
    run(optimizer, loss, 3)
    assert all(torch.isfinite(p).all() for p in factors) and factors[zero].abs().sum() > 0
    assert optimizer.state[factors[zero]]["power_vector"].norm() == pytest.approx(1)


@pytest.mark.parametrize("fill", [0.0, 1e-12, 1e12])
def test_spectron_survives_extreme_gradients(fill):
    factors, _ = pair_problem()
    optimizer = LowRankOptimizer([{"params": factors, "rule": "spectron", "lr": 0.1}])
    for p in factors:
        p.grad = torch.full_like(p, fill)
    before = [p.detach().clone() for p in factors]
    optimizer.step()
    moved = max((p.detach() - b).norm().item() for p, b in zip(factors, before, strict=True))
    assert moved == 0 if fill == 0 else 0 < moved < 0.2


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch_over_five_steps(weight_decay):
    sizes = [(5, 3), (4,), (2, 3, 4)]
    params, loss = problem(sizes)
    reference_params, reference_loss = problem(sizes)
    hyper = dict(lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    reference = torch.optim.AdamW(reference_params, fused=True, **hyper)
    run(LowRankOptimizer([{"params": params, "rule": "adamw", **hyper}]), loss, 5)
    for _ in range(5):
        reference.zero_grad()
        reference_loss().backward()
        reference.step()
    assert_close(params, reference_params, rtol=0, atol=0)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_equals_torch_over_five_steps(adjust):
    """torch's Muon orthogonalizes in bfloat16, so single updates agree to its 8-bit mantissa only: 3% of lr a step."""
    sizes = [(12, 5), (5, 12), (8, 8), (8, 8)]
    params, loss = problem(sizes, dtype=torch.float32)
    reference_params, reference_loss = problem(sizes, dtype=torch.float32)
    reference = torch.optim.Muon(reference_params, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    group = {"params": params, "rule": "muon", "lr": 0.02, "weight_decay": 0.1, "nesterov": True, "shape_scale": adjust}
    run(LowRankOptimizer([group]), loss, 5)
    for _ in range(5):
        reference.zero_grad()
        reference_loss().backward()
        reference.step()
    for p, q in zip(params, reference_params, strict=True):
        scale = 1.0 if adjust == "original" else 0.2 * max(p.shape) ** 0.5
        assert (p - q).abs().max() <= 5 * 0.03 * 0.02 * max(1.6, scale)


def test_muon_of_expert_stacks_is_that_of_each_expert():
    together, _ = problem([(3, 6, 4)])
    apart = [nn.Parameter(m.detach().clone()) for m in together[0]]
    G = torch.randn(3, 6, 4, dtype=torch.float64)
    together[0].grad = G
    for p, g in zip(apart, G, strict=True):
        p.grad = g.clone()
    for params in (together, apart):
        LowRankOptimizer([{"params": params, "rule": "muon", "lr": 0.1}]).step()
    assert_close(together[0].detach(), torch.stack([p.detach() for p in apart]))


def test_a_pair_without_gradients_stays_and_its_neighbours_move():
    factors, loss = pair_problem(pairs=3)
    alone, alone_loss = pair_problem(pairs=3)
    optimizer = LowRankOptimizer([{"params": factors, "rule": "spectron", "lr": 0.1}])
    reference = LowRankOptimizer([{"params": alone, "rule": "spectron", "lr": 0.1}])
    for opt, value in ((optimizer, loss), (reference, alone_loss)):
        for step in range(3):
            opt.zero_grad()
            value().backward()
            if opt is optimizer and step == 1:
                factors[3].grad = None  # the second pair's down factor
            opt.step()
    assert_close([factors[i] for i in (0, 1, 4, 5)], [alone[i] for i in (0, 1, 4, 5)])
    assert not torch.allclose(factors[2], alone[2])


@pytest.mark.parametrize("rule", ["spectron", "muon", "adamw", "adamw-capped"])
def test_a_reloaded_optimizer_continues_bit_for_bit(rule):
    factors, loss = pair_problem()
    options = {"update_cap": 0.01} if rule == "adamw-capped" else {}
    make = lambda params: LowRankOptimizer([{"params": params, "rule": rule, "lr": 0.05, **options}])  # noqa: E731
    optimizer = make(factors)
    run(optimizer, loss, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in factors]
    run(optimizer, loss, 3)
    again, again_loss = pair_problem()
    with torch.no_grad():
        for p, w in zip(again, weights, strict=True):
            p.copy_(w)
    resumed = make(again)
    resumed.load_state_dict(saved)
    run(resumed, again_loss, 3)
    assert_close(again, factors, rtol=0, atol=0)


def test_state_exists_before_the_first_step_and_is_complete():
    factors, _ = pair_problem()
    optimizer = LowRankOptimizer([{"params": factors, "rule": "spectron", "lr": 0.1}])
    keys = {k for s in optimizer.state_dict()["state"].values() for k in s}
    assert keys == {"momentum", "power_vector"} and len(optimizer.state_dict()["state"]) == len(factors)


@pytest.mark.parametrize(
    "group, message",
    [
        ({"rule": "sgd"}, "'sgd'"),
        ({"rule": "spectron", "lr": 1.5}, "at most 1"),
        ({"rule": "adamw", "lr": -1.0}, r"optim\.lr must be at least 0, got -1\.0"),
        ({"rule": "adamw", "lr": -1.0, "name": "auxiliary"}, r"optim\.aux_lr must be at least 0, got -1\.0"),
        ({"rule": "muon", "momentum": 1.0}, r"optim\.momentum must be in \[0, 1\), got 1\.0"),
        ({"rule": "muon", "lrr": 1.0}, "'lrr'"),
        ({"rule": "spectron", "power_iterations": 0}, "got 0"),
        ({"rule": "spectron", "norm": "frobenius"}, r"optim\.norm must be one of power, exact, got 'frobenius'"),
        ({"rule": "muon", "orthogonalizer": "svd"}, "'svd'"),
        ({"rule": "spectron", "orthogonalizer_steps": 0}, "got 0"),
        ({"rule": "spectron", "shape_scale": "rms"}, "'rms'"),
    ],
)
def test_bad_options_are_named(group, message):
    with pytest.raises(ValueError, match=message):
        LowRankOptimizer([{"params": pair_problem()[0], **group}])


@pytest.mark.parametrize("rule", ["spectron", "muon"])
def test_small_stacks_give_what_large_ones_give(rule, monkeypatch):
    """Splitting equal shapes over several stacks is a matter of memory alone."""
    results = []
    for limit in (1 << 25, 1):
        monkeypatch.setattr("nativerank.optim.stacks.STACK_BYTES_CPU", limit)
        factors, loss = pair_problem(pairs=3)
        run(LowRankOptimizer([{"params": factors, "rule": rule, "lr": 0.1}]), loss, 4)
        results.append([p.detach() for p in factors])
    assert_close(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("rule", ["spectron", "muon", "adamw"])
def test_cuda_gives_what_the_cpu_gives(rule):
    results = []
    for device in ("cpu", "cuda"):
        factors, loss = pair_problem()
        moved = [nn.Parameter(p.detach().to(device)) for p in factors]
        optimizer = LowRankOptimizer([{"params": moved, "rule": rule, "lr": 0.1}])
        for _ in range(4):
            for p, q in zip(factors, moved, strict=True):
                p.data, p.grad = q.detach().cpu(), None
            loss().backward()
            for p, q in zip(factors, moved, strict=True):
                q.grad = p.grad.to(device)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        results.append([p.detach().cpu() for p in moved])
    assert_close(*results)


def test_infinite_gradients_never_raise():
    """A guard or a scaler decides what to do about them; the optimizer must not stop the program."""
    factors, _ = pair_problem()
    optimizer = LowRankOptimizer([{"params": factors, "rule": "spectron", "lr": 0.1, "certified": True}])
    for p in factors:
        p.grad = torch.full_like(p, float("inf"))
    optimizer.step()
    assert any(torch.isnan(p).any() for p in factors)
