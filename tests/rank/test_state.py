"""Optimizer state of resized factors: what it is afterwards, and that a step from it is sound."""

import pytest
import torch
from torch.testing import assert_close

from nativerank.layers import LowRankLinear, SpectralLinear
from nativerank.linalg.orthogonalize import orthogonalize
from nativerank.linalg.resize import Resized
from nativerank.methods import METHODS, build_optimizer, factorize
from nativerank.optim.resize import resized_state

D, RANK = 24, 10
LOW_RANK = [name for name, row in METHODS.items() if row.layer and not row.guided]


def trained(method, dtype=torch.float64, steps=5, **options):
    """Three layers (two of one shape) after a few steps, their optimizer, and a function that makes another one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Linear(D, D), torch.nn.Linear(D, 12)).to(dtype)
    factorize(model, method, rank=RANK)
    bounded = "spectron" in method  # whose rate bounds ||dW|| and not entries of factors
    optimizer = build_optimizer(model, method, lr=0.2 if bounded else 0.02, **options)

    def step(seed):
        torch.manual_seed(seed)
        x, y = torch.randn(40, D, dtype=dtype), torch.randn(40, 12, dtype=dtype)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    for seed in range(steps):
        step(seed)
    return model, optimizer, step


def state_bytes(optimizer):
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())


def held_bytes(optimizer):
    """What is really allocated for it: storages, each once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for t in state.values()
    }
    return sum(storages.values())


every_method = pytest.mark.parametrize("method", LOW_RANK)


@every_method
def test_memory_and_flops_fall_and_rise_with_the_rank(method):
    model, optimizer, step = trained(method)
    seen = [(state_bytes(optimizer), held_bytes(optimizer), sum(g.flops for g in model[0].gemms()))]
    for rank in (5, 12):
        for layer in model:
            optimizer.resize(layer.resize(rank))
        step(9)
        seen.append((state_bytes(optimizer), held_bytes(optimizer), sum(g.flops for g in model[0].gemms())))
    (full, half, more) = seen
    assert all(h < 0.62 * f for h, f in zip(half, full, strict=True))
    assert all(m > f for m, f in zip(more, full, strict=True))


@every_method
@pytest.mark.parametrize("ranks", [(4, 12, 7), (RANK, 6, RANK)])
def test_training_goes_on_at_any_mixture_of_ranks(method, ranks):
    model, optimizer, step = trained(method)
    for layer, rank in zip(model, ranks, strict=True):
        optimizer.resize(layer.resize(rank, torch.Generator().manual_seed(3)))
    losses = [step(100) for _ in range(20)]  # the same batch: it must be learned
    assert losses[-1] < 0.95 * losses[0] and all(torch.isfinite(torch.tensor(losses)))
    for p, state in optimizer.state.items():
        for name in ("momentum", "exp_avg", "exp_avg_sq"):
            assert name not in state or state[name].shape == p.shape


@every_method
def test_every_state_has_the_keys_and_types_of_a_fresh_optimizer(method):
    model, optimizer, _ = trained(method, torch.float32)
    for layer in model:
        optimizer.resize(layer.resize(6))
    fresh = build_optimizer(model, method)
    for p, state in optimizer.state.items():
        expected = fresh.state[p]
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
        assert all(v.is_contiguous() for v in state.values())


@every_method
def test_a_column_that_is_dropped_or_added_leaves_the_others_moments_alone(method):
    """Growing: nothing else changes. Shrinking frames: columns are selected."""
    model, optimizer, _ = trained(method)
    layer = model[0]
    up, before = layer.up.weight, {k: v.clone() for k, v in optimizer.state[layer.up.weight].items()}
    optimizer.resize(layer.resize(RANK + 2))
    after = optimizer.state[up]
    for name in before:
        old, new = before[name], after[name]
        if name == "R":
            assert_close(new[:RANK, :RANK], old)
        elif name not in ("step", "power_vector"):
            assert_close(new[:, :RANK], old)
            if name != "exp_avg_sq":
                assert not new[:, RANK:].any()
        else:
            assert torch.equal(old, new)


def test_first_moments_are_averages_of_the_new_factors_gradients():
    """The average of gradients, carried along, is the average of the carried gradients: to rounding, for AdamW too."""
    for method, name in (("lowrank-muon", "momentum"), ("lowrank-adamw", "exp_avg")):
        model, optimizer, _ = trained(method)
        layer = model[0]
        states = {p: optimizer.state[p][name].clone() for p in (layer.up.weight, layer.down.weight)}
        changes = layer.resize(4)
        optimizer.resize(changes)
        for change in changes:
            M = states[change.parameter].mT if change.down else states[change.parameter]
            new = optimizer.state[change.parameter][name]
            assert_close(new.mT if change.down else new, M @ change.T)


@pytest.mark.parametrize("layer_state", [0, 1], ids=["up", "down"])
def test_second_moments_follow_from_the_other_factor_where_columns_are_mixed(layer_state):
    """Exactly so for gradients of W whose entries have a variance per row (of A's side) and no correlation."""
    torch.manual_seed(0)
    layer = LowRankLinear(9, 7, 6, dtype=torch.float64)
    with torch.no_grad():  # correlated columns of different sizes
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) @ torch.eye(p.shape[1], dtype=p.dtype) + 2 * torch.randn_like(p[:, :1]))
    A, B = (f.detach().clone() for f in layer.factors())
    X, other = ((A, B), (B, A))[layer_state]
    scale = torch.rand(X.shape[0], 1, dtype=torch.float64)
    G = (scale * torch.randn(100_000, X.shape[0], other.shape[0], dtype=torch.float64)) @ other
    change = layer.resize(4)[layer_state]
    v = G.square().mean(0)
    state = {"exp_avg_sq": v.mT if change.down else v}
    found = resized_state(state, change)["exp_avg_sq"]
    assert_close(found.mT if change.down else found, (G @ change.T).square().mean(0), rtol=0.05, atol=0)


def test_second_moments_of_new_columns_are_the_mean_of_their_row_unless_nothing_depends_on_them():
    v = torch.rand(5, 3, dtype=torch.float64)
    T = torch.eye(3, 4, dtype=torch.float64)
    change = Resized(torch.empty(0), T)
    assert_close(resized_state({"exp_avg_sq": v}, change)["exp_avg_sq"][:, 3], v.mean(1))
    assert not resized_state({"exp_avg_sq": v}, change._replace(free=True))["exp_avg_sq"][:, 3].any()
    s = torch.rand(3, dtype=torch.float64)
    assert_close(resized_state({"exp_avg_sq": s}, change)["exp_avg_sq"], torch.cat([s, s.mean()[None]]))


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_adam_does_not_leap_in_new_columns(betas):
    """From zeros with an old step count the first steps would be up to 3.2 and later 6.6 times the rate."""
    model, optimizer, step = trained("lowrank-adamw", betas=betas, steps=50)
    layer, lr = model[0], 0.02
    optimizer.resize(layer.resize(RANK + 4))
    for seed in range(20):
        before = layer.up.weight.detach().clone()
        step(200 + seed)
        assert (layer.up.weight - before).abs().max() < 2.5 * lr


def test_the_triangle_of_selected_columns_is_a_principal_submatrix_and_grows_by_ones():
    R = torch.randn(4, 4, dtype=torch.float64).triu()
    select = torch.eye(4, dtype=torch.float64)[:, [0, 2, 3]]
    state = {"R": R, "exp_avg": torch.randn(7, 4, dtype=torch.float64)}
    found = resized_state(state, Resized(torch.empty(0), select))["R"]
    assert torch.equal(found, R[[0, 2, 3]][:, [0, 2, 3]]) and torch.equal(found, found.triu())
    grown = resized_state(state, Resized(torch.empty(0), torch.eye(4, 5, dtype=torch.float64)))
    assert torch.equal(grown["R"][:4, :4], R) and grown["R"][4].tolist() == [0, 0, 0, 0, 1]
    assert_close(grown["exp_avg"], torch.cat([state["exp_avg"], torch.zeros(7, 1, dtype=torch.float64)], 1))


def test_raw_moments_are_carried_by_way_of_the_frames():
    """With a diagonal R there is nothing to mix: the columns are selected."""
    R, M = torch.diag(torch.tensor([1.0, 2, 3, 4])).double(), torch.randn(7, 4, dtype=torch.float64)
    select = torch.eye(4, dtype=torch.float64)[:, [1, 3]]
    found = resized_state({"R": R, "exp_avg": M}, Resized(torch.empty(0), select))
    assert_close(found["exp_avg"], M[:, [1, 3]])


def test_the_power_vector_is_the_leading_direction_at_once():
    model, optimizer, _ = trained("spectron")
    layer = model[0]
    optimizer.resize(layer.resize(5))
    for p, X in ((layer.up.weight, layer.factors()[0]), (layer.down.weight, layer.factors()[1])):
        u = optimizer.state[p]["power_vector"]
        assert_close((X.mT @ u).norm(), torch.linalg.matrix_norm(X, 2))


def test_a_state_that_nobody_thought_of_is_an_error():
    with pytest.raises(ValueError, match="what becomes of the optimizer state 'memory'"):
        resized_state({"memory": torch.zeros(3, 2)}, Resized(torch.empty(0), torch.eye(2)))


@pytest.mark.parametrize("threads", [1, 3])  # eigenvalues or products inside
@pytest.mark.parametrize(("method", "steps"), [("newton-schulz", 5), ("polar-express", 7)])
@pytest.mark.parametrize(("d", "rank", "new"), [(60, 12, 4), (400, 170, 20)])
def test_empty_momentum_columns_are_not_blown_up(method, steps, d, rank, new, threads):
    torch.manual_seed(0)
    M = torch.randn(d, rank) * torch.logspace(0, -4, rank)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        O = orthogonalize(torch.cat([M, torch.zeros(d, new)], 1), method, steps)
    finally:
        torch.set_num_threads(before)
    assert O[:, rank:].abs().max() < 1e-6
    assert torch.linalg.matrix_norm(O[:, :rank], 2) > 0.7


@pytest.mark.parametrize("method", ["spectron", "lowrank-muon", "stiefel-spectron"])
def test_new_columns_wait_until_there_is_something_to_follow(method):
    """B of a grown pair, and the frames where s = 0, have no gradient yet: the step leaves them where they are.

    Of frames only the retraction moves them, out of the way of the others.
    """
    model, optimizer, step = trained(method)
    layer = model[1]
    optimizer.resize(layer.resize(RANK + 4))
    before = layer.factors()[-1].detach().clone()
    step(300)
    assert not optimizer.state[layer.down.weight]["momentum"].mT[:, RANK:].any()
    if method != "stiefel-spectron":
        assert_close(layer.factors()[-1][:, RANK:].detach(), before[:, RANK:], atol=1e-6, rtol=0)
    moved = layer.s[RANK:] if method == "stiefel-spectron" else layer.factors()[0][:, RANK:]
    assert bool((moved.abs() > 0).any())


def test_clipped_and_decayed_steps_of_a_certified_method_keep_their_bound_after_a_change():
    from nativerank.linalg.change import update_norm

    model, optimizer, step = trained("spectron", certified=True)
    for rank in (5, 9):
        for layer in model:
            optimizer.resize(layer.resize(rank))
        old = [[f.detach().clone() for f in layer.factors()] for layer in model]
        step(400 + rank)
        for (A, B), layer in zip(old, model, strict=True):
            assert update_norm(A, B, *(f.detach() for f in layer.factors())) <= 0.2 * (1 + 1e-9)


@every_method
def test_layers_keep_their_constraint(method):
    model, optimizer, step = trained(method)
    if not isinstance(model[0], SpectralLinear):
        assert isinstance(model[0], LowRankLinear)
        return
    for rank in (4, 9):
        for layer in model:
            optimizer.resize(layer.resize(rank))
        step(500 + rank)
        for layer in model:
            U, _, V = layer.factors()
            for Q in (U, V):
                assert_close(Q.mT @ Q, torch.eye(rank, dtype=Q.dtype), atol=1e-5, rtol=0)
