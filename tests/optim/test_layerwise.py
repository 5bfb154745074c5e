"""Layer-wise updating: the ordinary step's bits, one block's gradients at a time, one backward pass per step."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn

from nativerank.layers import LowRankLinear
from nativerank.methods import METHODS, build_optimizer, factorize, find_method
from nativerank.models import materialize, read_hf_config, skeleton
from nativerank.optim import optimizer as optimizer_module
from nativerank.optim.optimizer import LowRankOptimizer

STEPS = 20


def llama(method, config_file):
    model = skeleton(read_hf_config(config_file))
    if find_method(method).layer:
        factorize(model, method, rank=8)
    return materialize(model, seed=0, init_scale=0.577).train()


def optimizer_of(model, method, layerwise, **options):
    guided = {"guided_steps": STEPS // 2} if find_method(method).guided else {}
    return build_optimizer(
        model, method, lr=0.02, aux_lr=0.01, weight_decay=0.1, layerwise=layerwise, **guided, **options
    )


def batches(steps=STEPS):
    return torch.randint(0, 300, (steps, 2, 17), generator=torch.Generator().manual_seed(0))


def train(model, optimizer, ids):
    losses = []
    for batch in ids:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_bits(a, b):
    for (name, p), (_, q) in zip(a[0].named_parameters(), b[0].named_parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, value in a[1].state[p].items():
            assert torch.equal(value, b[1].state[q][key]), f"{name}/{key}"


def both(build, **options):
    """(model, optimizer) twice from the same weights, the second layer-wise."""
    model, method = build()
    twin = copy.deepcopy(model)
    return [(m, optimizer_of(m, method, layerwise, **options)) for m, layerwise in ((model, False), (twin, True))]


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_ordinary_step_bit_for_bit(method, tiny_config):
    plain, layerwise = both(lambda: (llama(method, tiny_config), method))
    assert train(*plain, batches()) == train(*layerwise, batches())
    assert_same_bits(plain, layerwise)


@pytest.mark.parametrize("options", [{"certified": True}, {"frames": "one"}, {"preserve": True}], ids=str)
def test_so_do_the_forms_of_a_rule(options, tiny_config):
    model, method = skeleton(read_hf_config(tiny_config)), "stiefel-spectron"
    factorize(model, method, rank=8, frames=options.get("frames"))
    plain, layerwise = both(lambda: (materialize(model, seed=0, init_scale=0.577).train(), method), **options)
    assert train(*plain, batches(6)) == train(*layerwise, batches(6))
    assert_same_bits(plain, layerwise)


def test_pieces_meant_for_one_core_each_run_so(tiny_config, monkeypatch):
    """A product's bits depend on its threads, so a stack that is alone in the backward pass may not get all cores."""
    monkeypatch.setattr("nativerank.optim.optimizer.at_once", lambda params: 2)
    monkeypatch.setattr("nativerank.optim.stacks.STACK_BYTES_CPU", 1)
    workers, step = [], optimizer_module.step_bucket

    def seen(*arguments):
        workers.append(threading.current_thread().name)
        step(*arguments)

    monkeypatch.setattr(optimizer_module, "step_bucket", seen)
    plain, layerwise = both(lambda: (llama("spectron", tiny_config), "spectron"))
    assert train(*plain, batches(2)) == train(*layerwise, batches(2))
    assert_same_bits(plain, layerwise)
    assert len(workers) == 2 * 2 * 14 and all(name.startswith("nativerank") for name in workers)


def test_only_one_block_has_gradients_at_a_time(tiny_config, monkeypatch):
    monkeypatch.setattr("nativerank.optim.stacks.STACK_BYTES_CPU", 1)  # as if every matrix filled a stack
    model = llama("sct", tiny_config)
    optimizer = optimizer_of(model, "sct", True)
    alive = []
    optimizer.layerwise.watch(
        False, False, lambda phase: alive.append(sum(p.numel() for p in model.parameters() if p.grad is not None))
    )
    train(model, optimizer, batches(1))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel()
    assert 0 < max(alive) <= max(block, head)
    assert all(p.grad is None for p in model.parameters())


class Tangled(nn.Module):
    """A layer used twice, a tied weight, and a branch that is not always taken."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(300, 16)
        self.twice, self.sometimes = LowRankLinear(16, 16, 4), LowRankLinear(16, 16, 4)
        self.other = LowRankLinear(16, 16, 4)
        self.calls = 0

    def forward(self, input_ids, labels, use_cache):
        self.calls += 1
        x = self.embedding(input_ids)
        x = self.twice(torch.tanh(self.twice(x)))
        x = x + (self.sometimes(x) if self.calls % 3 == 0 else self.other(x))
        logits = x @ self.embedding.weight.mT
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())})


@pytest.mark.parametrize("method", ["spectron", "lowrank-adamw", "lowrank-muon"])
def test_weights_used_twice_tied_or_not_at_all(method):
    plain, layerwise = both(lambda: (Tangled(), method))
    assert train(*plain, batches(7)) == train(*layerwise, batches(7))
    assert_same_bits(plain, layerwise)


def test_gradients_set_by_hand_are_used():
    plain, layerwise = both(lambda: (Tangled(), "spectron"))
    for model, optimizer in (plain, layerwise):
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert_same_bits(plain, layerwise)


def one_loss(model):
    (batch,) = batches(1)
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def test_a_second_backward_pass_is_an_error_that_says_what_to_do():
    model = Tangled()
    optimizer = optimizer_of(model, "spectron", True)
    one_loss(model).backward()
    with pytest.raises(ValueError, match="one backward pass per step: call step"):
        one_loss(model).backward()
    optimizer.zero_grad()
    one_loss(model).backward()
    optimizer.step()


def test_a_copy_updates_its_own_model():
    model = Tangled()
    pair = model, optimizer_of(model, "spectron", True)
    train(*pair, batches(2))
    twins = copy.deepcopy(pair)
    assert train(*pair, batches(3)) == train(*twins, batches(3))
    assert_same_bits(pair, twins)
    assert all(p.grad is None for p in twins[0].parameters())


def test_the_model_outlives_its_optimizer():
    model = Tangled()
    optimizer = optimizer_of(model, "spectron", True)
    del optimizer
    gc.collect()
    before = [p.detach().clone() for p in model.parameters()]
    one_loss(model).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert model.twice.up.weight.grad is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_ends_the_updates_where_it_turns_up(bad):
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    groups = [{"params": list(layers.parameters()), "rule": "adamw", "lr": 0.1}]
    optimizer = LowRankOptimizer(groups)
    optimizer.update_layerwise()
    optimizer.layerwise.watch(measure=True, refuse=True, mark=lambda phase: None)
    layers[1].weight.register_hook(lambda grad: grad * bad)
    before = copy.deepcopy(layers)
    layers(torch.ones(2, 8)).sum().backward()
    assert optimizer.layerwise.refused
    assert not torch.isfinite(optimizer.layerwise.grad_norm(layers.parameters()))
    optimizer.layerwise.finish()
    moved = [not torch.equal(p, q) for p, q in zip(layers.parameters(), before.parameters(), strict=True)]
    assert moved[4:] == [True] * 4 and moved[:2] == [False] * 2 and not moved[2]
    assert optimizer.layerwise.moved == sum(moved)
    assert all(torch.isfinite(p).all() and p.grad is None for p in layers.parameters())


def test_without_the_check_a_bad_gradient_is_used_as_in_the_ordinary_step():
    weights = []
    for layerwise in (False, True):
        layer = nn.Linear(4, 4)
        optimizer = LowRankOptimizer([{"params": list(layer.parameters()), "rule": "adamw", "lr": 0.1}])
        if layerwise:
            optimizer.update_layerwise()
        (layer(torch.ones(1, 4)).sum() * float("nan")).backward()
        optimizer.step()
        weights.append(layer.weight.detach().isnan())
    assert weights[0].all() and weights[1].all()
