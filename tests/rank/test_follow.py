"""Loading what has other shapes: ranks and guides of a checkpoint are taken up, with the optimizer, bit for bit."""

import copy
import io

import pytest
import torch

import nativerank as nr
from nativerank.layers import LowRankExperts, guided_layers
from nativerank.methods import METHODS
from nativerank.optim.reshape import resize
from nativerank.rank.follow import stored_rank

LOW_RANK = [name for name, row in METHODS.items() if row.layer]
D = 24


def built(method, guided_steps=4, rank=10):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Linear(D, D), torch.nn.Linear(D, 12))
    nr.factorize(model, method, rank=rank)
    guided = {"guided_steps": guided_steps} if METHODS[method].guided else {}
    return model, nr.build_optimizer(model, method, lr=0.02, **guided)


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        loss = (model(torch.randn(40, D)) - torch.randn(40, 12)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def on_disk(model, optimizer):
    """A checkpoint as every trainer makes one, read the way that allows no code."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(model, other, optimizer, twin):
    weights, states = [m.state_dict() for m in (model, other)], [o.state_dict()["state"] for o in (optimizer, twin)]
    assert weights[0].keys() == weights[1].keys() and states[0].keys() == states[1].keys()
    return all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0]) and all(
        torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i]
    )


@pytest.mark.parametrize("built_after", [False, True], ids=["optimizer-first", "weights-first"])
@pytest.mark.parametrize("method", LOW_RANK)
def test_a_resumed_loop_is_an_uninterrupted_one_with_other_ranks(method, built_after):
    model, optimizer = built(method)
    train(model, optimizer, range(3))
    if not METHODS[method].guided:
        resize(optimizer, model, [(model[0], 6, None), (model[1], 13, torch.Generator().manual_seed(0))])
    train(model, optimizer, range(3, 5))  # the guides are gone by now
    kept = on_disk(model, optimizer)
    train(model, optimizer, range(5, 8))

    other, twin = built(method)
    nr.follow_checkpoints(other, None if built_after else twin)
    other.load_state_dict(kept["model"])  # strict
    if built_after:
        twin = nr.build_optimizer(other, method, lr=0.02, **({"guided_steps": 4} if METHODS[method].guided else {}))
    twin.load_state_dict(kept["optimizer"])
    train(other, twin, range(5, 8))
    assert same(model, other, optimizer, twin)


def test_guides_that_have_left_come_back_with_an_earlier_checkpoint():
    model, optimizer = built("self-guided", guided_steps=6)
    nr.follow_checkpoints(model, optimizer)
    train(model, optimizer, range(2))
    early = on_disk(model, optimizer)
    train(model, optimizer, range(2, 4))
    twin, other = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    train(model, optimizer, range(4, 8))
    assert all(layer.guide is None for layer in guided_layers(model).values())
    model.load_state_dict(early["model"])
    optimizer.load_state_dict(early["optimizer"])
    assert optimizer.guides.step == 2
    train(model, optimizer, range(2, 4))
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())
    assert optimizer.state_dict()["guided_step"] == twin["guided_step"] == 4


def test_it_follows_as_a_part_of_another_module_and_shard_by_shard():
    model, optimizer = built("spectron", rank=10)
    tensors = {f"inner.{name}": value for name, value in built("spectron", rank=7)[0].state_dict().items()}
    whole = torch.nn.ModuleDict({"inner": model})
    handle = nr.follow_checkpoints(model, optimizer)
    for name in tensors:  # every tensor in a file of its own
        whole.load_state_dict({name: tensors[name]}, strict=False)
    assert [layer.rank for layer in model] == [7, 7, 7]
    assert all(torch.equal(value, tensors[name]) for name, value in whole.state_dict().items())
    train(model, optimizer, range(2))
    handle.remove()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(built("spectron", rank=10)[0].state_dict())


def test_frozen_factors_follow_without_any_state():
    model, _ = built("spectron")
    model[1].requires_grad_(False)
    optimizer = nr.build_optimizer(model, "spectron", lr=0.02)
    nr.follow_checkpoints(model, optimizer)
    model.load_state_dict(built("spectron", rank=6)[0].state_dict())
    assert model[1].rank == 6 and not model[1].up.weight.requires_grad
    before = model[1].to_dense()
    train(model, optimizer, range(2))
    assert torch.equal(model[1].to_dense(), before)
    on_disk(model, optimizer)


def test_the_rank_of_a_stack_of_experts_is_read_too():
    stack = LowRankExperts(3, 8, 6, 4)
    stored = {f"experts.{name}": value.shape for name, value in stack.state_dict().items()}
    assert stored_rank(stored, "experts") == 4
    assert stored_rank(stored, "elsewhere") is None
