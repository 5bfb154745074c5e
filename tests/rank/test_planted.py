"""A planted teacher: matrices of known rank are found, from above by shrinking and from below by growing."""

import pytest
import torch

from nativerank.config import AdaptConfig
from nativerank.layers import LowRankExperts, LowRankLinear
from nativerank.methods import build_optimizer, factorize
from nativerank.rank.controller import PATIENCE, RankController

D, PLANTED, STEPS, MULTIPLE = 40, (4, 8, 12), 400, 4
ADAPT = AdaptConfig(
    mode="schedule", threshold=0.99, start=0.2, every=0.05, until=0.9, min=1, multiple=MULTIPLE, hysteresis=0.1
)
# Peak rates; that of s for stiefel-spectron, where it is a rate of its own.
RATES = {"spectron": 0.1, "lowrank-adamw": 0.01, "sct": 0.02, "tsvd": 0.02, "stiefel-spectron": 0.1}


def teacher(rank, generator):
    """Singular values 1 to 2."""
    U, V = (torch.linalg.qr(torch.randn(D, rank, generator=generator))[0] for _ in range(2))
    return (U * torch.linspace(1, 2, rank)) @ V.mT


def learned(method, start):
    """Ranks after each change, and the last loss, of linear regressions that begin at rank `start`."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(D, D, bias=False) for _ in PLANTED)
    factorize(model, method, rank=start)
    targets = [teacher(rank, generator) for rank in PLANTED]
    extra = {"s_lr": 0.05} if method == "stiefel-spectron" else {}
    optimizer = build_optimizer(model, method, lr=RATES[method], **extra)
    controller = RankController(model, optimizer, ADAPT, STEPS)
    history = []
    for step in range(1, STEPS + 1):
        optimizer.set_rate(max(0.05, 1 - step / STEPS))
        x = torch.randn(64, D, generator=generator)
        optimizer.zero_grad()
        loss = sum((layer(x) - x @ W.mT).square().mean() for layer, W in zip(model, targets, strict=True))
        loss.backward()
        optimizer.step()
        if controller.due(step) and controller.look(step):
            history.append([layer.rank for layer in model])
    return history, loss.item()


@pytest.mark.parametrize(
    ("method", "start"), [(m, s) for m in RATES for s in (20, 4) if (m, s) != ("stiefel-spectron", 20)]
)
def test_planted_ranks_are_found_to_within_one_multiple(method, start):
    """Not stiefel-spectron from above: at these rates it does not reach the teacher in so few steps."""
    history, loss = learned(method, start)
    assert all(abs(rank - k) <= MULTIPLE for rank, k in zip(history[-1], PLANTED, strict=True)), history
    assert loss < 0.1, "and the teacher, whose mean square is 1.4, is learned"


def controlled(adapt=ADAPT, rank=12, steps=10, seed=0):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Linear(D, 20))
    factorize(model, rank=rank)
    optimizer = build_optimizer(model)
    return model, optimizer, RankController(model, optimizer, adapt, steps, seed)


def set_spectrum(layer, squares):
    """Gives the factors these energies, in any old basis."""
    with torch.no_grad():
        A, B = layer.factors()
        Q, P = torch.linalg.qr(A)[0], torch.linalg.qr(B)[0]
        A.copy_(Q * torch.tensor(squares).sqrt())
        B.copy_(P)


FLAT = [1.0] * 12


def test_growth_that_was_not_used_is_dropped_when_its_time_is_over_and_not_repeated():
    model, _, controller = controlled()
    for layer in model:
        set_spectrum(layer, FLAT)
    assert controller.look(1).ranks == {"0": (12, 16), "1": (12, 13)}, "13: the last rank that saves something"
    for step in range(2, 2 + PATIENCE):
        assert controller.look(step) is None, "new columns start from nothing"
    assert controller.look(5).ranks == {"0": (16, 12)}, "one column of 13 is within the hysteresis"
    for step in range(6, 12):
        assert controller.look(step) is None, "the spectrum is still flat, but more was of no use"


def test_growth_that_was_used_goes_on():
    model, _, controller = controlled()
    set_spectrum(model[1], [1.0, *[1e-9] * 11])
    ranks = []
    for step in range(1, 8):
        set_spectrum(model[0], [1.0] * model[0].rank)
        controller.look(step)
        ranks.append(model[0].rank)
    assert ranks == [16, 19, 19, 19, 19, 19, 19], "until factors would save nothing"
    assert model[1].rank == MULTIPLE


def test_a_change_says_what_it_was():
    model, _, controller = controlled()
    set_spectrum(model[0], [1.0, 1.0, 1.0, 0.9, 0.02, *[1e-6] * 7])
    set_spectrum(model[1], [1.0, *[1e-9] * 11])
    change = controller.look(1)
    assert change.ranks == {"0": (12, 4), "1": (12, 4)}
    assert change.energy["0"] == pytest.approx(3.9 / 3.92, abs=1e-5) and change.energy["1"] == pytest.approx(1)


def test_looks_repeat_and_depend_on_seed_and_step():
    grown = []
    for seed, step in ((0, 1), (0, 1), (1, 1), (0, 2)):
        model, _, controller = controlled(seed=seed)
        for layer in model:
            set_spectrum(layer, FLAT)
        controller.look(step)
        grown.append(model[0].down.weight.detach())
    assert torch.equal(grown[0], grown[1])
    assert not torch.equal(grown[0], grown[2]) and not torch.equal(grown[0], grown[3])


def test_a_factor_that_is_not_finite_is_named_and_nothing_has_changed():
    model, _, controller = controlled()
    set_spectrum(model[0], [1.0, *[1e-9] * 11])
    with torch.no_grad():
        model[1].up.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^1: a factor holds NaN or infinity, so its spectrum says nothing"):
        controller.look(1)
    assert model[0].rank == model[1].rank == 12


def test_a_limit_that_nothing_can_reach_is_refused():
    from dataclasses import replace

    with pytest.raises(ValueError, match=rf"rank\.adapt\.max {D + 1} is beyond min\(d_in, d_out\) .*{D} at most"):
        controlled(replace(ADAPT, max=D + 1))
    controlled(replace(ADAPT, max=D))


def test_frozen_factors_stay():
    model, _, _ = controlled()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model)
    controller = RankController(model, optimizer, ADAPT, 10)
    for layer in model:
        set_spectrum(layer, [1.0, *[1e-9] * 11])
    assert list(controller.look(1).ranks) == ["1"]


def test_stacks_of_experts_change_as_one():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"experts": LowRankExperts(3, D, 20, 12), "linear": LowRankLinear(D, D, 12)})
    optimizer = build_optimizer(model, "spectron")
    with torch.no_grad():
        model["experts"].up[..., 6:] *= 1e-4
    controller = RankController(model, optimizer, ADAPT, 10)
    W = model["experts"].to_dense()
    assert controller.look(1).ranks["experts"] == (12, 8)
    assert (model["experts"].to_dense() - W).norm() < 0.1 * W.norm()
    ends = torch.tensor([2, 4, 6], dtype=torch.int32)
    model["experts"](torch.randn(6, D), ends).square().sum().backward()
    model["linear"](torch.randn(6, D)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[model["experts"].up]["momentum"].shape == (3, 20, 8)


def test_a_state_brings_another_model_to_the_same_shapes():
    model, optimizer, controller = controlled()
    for layer in model:
        set_spectrum(layer, FLAT)
    controller.look(1)
    other, other_optimizer, other_controller = controlled()
    other_controller.restore(controller.state(), "there")
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.shape == q.shape
        for key, value in optimizer.state[p].items():
            assert other_optimizer.state[q][key].shape == value.shape
    assert other_controller.state() == controller.state()


def test_a_state_of_other_ranks_is_refused():
    _, _, controller = controlled(rank=8)
    with pytest.raises(ValueError, match="there began with rank 8 in 0, this configuration with 12"):
        controlled()[2].restore(controller.state(), "there")
