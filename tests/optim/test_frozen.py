"""Frozen parameters: skipped without a word, in a loop too; what makes no sense is one clear error."""

import pytest
import torch

import nativerank as nr
from nativerank.methods import METHODS

D = 16


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(20, D)
        self.first, self.second = torch.nn.Linear(D, D), torch.nn.Linear(D, D)
        self.norm = torch.nn.LayerNorm(D)

    def forward(self, ids):
        return self.norm(self.second(self.first(self.embedding(ids)).relu()))


def built(method):
    net = Net()
    if METHODS[method].layer:
        nr.factorize(net, method, rank=4)
    return net


def optimizer_of(net, method):
    return nr.build_optimizer(net, method, lr=0.02, **({"guided_steps": 5} if METHODS[method].guided else {}))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_stays_and_has_no_state(method):
    net = built(method)
    frozen = [*net.first.parameters(), net.embedding.weight]
    for p in frozen:
        p.requires_grad_(False)
    before = {name: p.clone() for name, p in net.named_parameters()}
    optimizer = optimizer_of(net, method)
    assert not any(p in optimizer.state for p in frozen)
    for seed in range(3):
        torch.manual_seed(seed)
        net(torch.randint(20, (4, 6))).pow(3).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    still = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert still == {name for name in before if name.startswith(("first", "embedding"))}
    # A coin may have left the guide out, which then has no gradient, but never the rest.
    assert moved | {"second.guide"} >= before.keys() - still and not moved & still


def test_what_is_frozen_later_stays_too():
    net = built("sct")
    optimizer = optimizer_of(net, "sct")
    net.first.requires_grad_(False)
    before = net.first.to_dense()
    net(torch.arange(8)).pow(3).mean().backward()
    optimizer.step()
    assert torch.equal(net.first.to_dense(), before)


def test_no_trainable_matrix_is_an_error_that_says_why():
    net = built("spectron").requires_grad_(False)
    with pytest.raises(ValueError, match="spectron found factors, but all of them are frozen"):
        optimizer_of(net, "spectron")
    with pytest.raises(ValueError, match="dense-adamw found no hidden matrix"):
        optimizer_of(Net().requires_grad_(False), "dense-adamw")
