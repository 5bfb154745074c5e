"""A step on tensors without numbers: what it holds and does is what the shapes say."""

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from nativerank.accounting.flops import flops_per_token
from nativerank.accounting.trace import BACKWARD, FORWARD, OPTIMIZER, trace_step
from nativerank.config import ModelConfig, RunConfig, TrainConfig
from nativerank.plan.passes import Stage
from nativerank.plan.subject import subject

N, D, H = 8, 16, 32
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def traced(adam=False, gradients=False):
    """Of two linear maps with a sigmoid between them, and the sum as loss."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(D, H, bias=False), nn.Sigmoid(), nn.Linear(H, D, bias=False))
        x = torch.empty(N, D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if adam else None
        for p in model.parameters() if gradients else ():
            p.grad = torch.empty_like(p)
        return trace_step(model, lambda m: m(x).sum(), optimizer)


def test_what_waits_for_the_backward_pass():
    found = traced()
    assert found.before == 4 * 2 * D * H
    # The sigmoid's output waits, and the loss itself; so does x, which the tracer first sees when it is read: not made.
    assert found.held == 4 * (N * H + 1)
    assert found.peak[FORWARD] >= 4 * (2 * N * H) and found.peak_bytes == found.before + max(found.peak.values())


def test_gradients_are_new_or_there_before():
    new, there = traced(), traced(gradients=True)
    assert there.before == 2 * new.before
    assert new.peak[BACKWARD] >= 4 * 2 * D * H
    assert there.held == new.held


def test_flops_and_bytes_of_products():
    ops = {(op.phase, op.name): op for op in traced(adam=True).ops}
    assert ops[FORWARD, "mm"].flops == 2 * N * D * H and ops[FORWARD, "mm"].calls == 2
    assert ops[FORWARD, "mm"].bytes == 4 * (N * D + D * H + N * H)
    backward = [op for op in traced().ops if (op.phase, op.name) == (BACKWARD, "mm")]
    assert sum(op.calls * op.flops for op in backward) == 3 * 2 * N * D * H  # x wants no gradient
    assert any(phase == OPTIMIZER for phase, _ in ops) and ("forward", "t") not in ops


@pytest.mark.parametrize("method", ["spectron", "dense-adamw"])
def test_a_pass_of_a_model_does_the_exact_flops(method):
    """The chunked loss makes the head's gradients on the way forward; attention its scores again on the way back."""
    train = TrainConfig(steps=1, batch_size=2, accumulation=1, context=64)
    planned = subject(RunConfig(model=ModelConfig(preset="pocket"), method=method, device="cpu", train=train))
    exact, tokens = flops_per_token(planned.build()[0], 64), 2 * 64
    flops = dict.fromkeys((FORWARD, BACKWARD), 0.0)
    for op in Stage(planned, None).run(2).ops:
        flops[op.phase] += op.calls * op.flops
    assert flops[FORWARD] == tokens * (exact.forward + 2 * exact.head)
    assert flops[BACKWARD] == tokens * (2 * (exact.forward - exact.head) + exact.attention / 2)


@pytest.mark.parametrize("method", ["spectron", "dense-adamw"])
def test_a_pass_of_experts_does_the_exact_flops(method, tmp_path):
    """A row for each expert that a token visits, factored or dense; experts without tokens do nothing."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    train = TrainConfig(steps=1, batch_size=2, accumulation=1, context=64)
    chosen = ModelConfig(preset="pocket", config=str(tmp_path))
    planned = subject(RunConfig(model=chosen, method=method, device="cpu", train=train))
    model, tokens = planned.build()[0], 2 * 64
    exact, flops = flops_per_token(model, 64), dict.fromkeys((FORWARD, BACKWARD), 0.0)
    for op in Stage(planned, None).run(2).ops:
        flops[op.phase] += op.calls * op.flops
    router = 2 * model.config.hidden_size * model.config.num_local_experts * model.config.num_hidden_layers
    assert flops[FORWARD] == tokens * (exact.forward + router + 2 * exact.head)
    assert flops[BACKWARD] == tokens * (2 * (exact.forward + router - exact.head) + exact.attention / 2)


def test_autocast_keeps_no_weights_of_what_is_made_again():
    layers, width = 4, 64
    with FakeTensorMode():
        model, x = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers)), torch.empty(N, width)

        def loss(model):
            y = x
            for layer in model:
                y = checkpoint(layer, y, use_reentrant=False)
            return y.float().sum()

        found = trace_step(model, loss, autocast_bf16=True)
    assert found.peak[FORWARD] < 2 * width * width * 2  # two narrow weights, not four


@pytest.mark.parametrize("width", [64, 128])
def test_autocast_keeps_copies_of_weights_in_half_the_bytes(width):
    with FakeTensorMode():
        model, x = nn.Linear(width, width, bias=False), torch.empty(N, width)
        found = trace_step(model, lambda m: m(x).float().sum(), autocast_bf16=True)
    assert found.held == 2 * N * width + 4  # the narrow input, and the loss; x itself wants no gradient, so no weight
