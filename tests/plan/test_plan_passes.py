"""A pass on tensors without numbers holds and makes what the same pass does on real ones."""

import pytest
import torch

from nativerank.accounting.trace import BACKWARD, FORWARD, OPTIMIZER, trace_step, trace_update
from nativerank.config import ModelConfig, RunConfig, TrainConfig
from nativerank.evaluate.loss import mean_loss
from nativerank.models import allocate
from nativerank.plan.passes import forward_and_backward, update_bytes
from nativerank.plan.subject import subject
from nativerank.train.setup import optimizer_for


@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize("method", ["spectron", "sct", "dense-muon"])
def test_without_numbers_as_with_them(method, recompute):
    train = TrainConfig(steps=1, batch_size=2, accumulation=1, context=64, recompute=recompute)
    planned = subject(RunConfig(model=ModelConfig(preset="pocket"), method=method, device="cpu", train=train))
    model = allocate(planned.build(2)[0])
    for p in model.parameters():
        torch.nn.init.normal_(p.data, std=0.02)
    ids = torch.randint(planned.vocab_size, (2, 64))
    real = trace_step(model, lambda m: mean_loss(m, ids, ids))
    made = forward_and_backward(planned, 2, 2)
    assert made.held == pytest.approx(real.held, rel=0.005)  # the ids, scalars of checkpoints
    for phase in (FORWARD, BACKWARD):
        assert made.peak[phase] == pytest.approx(real.peak[phase], rel=0.02), phase
    flops = [sum(op.flops for op in found.ops) for found in (made, real)]
    assert flops[0] == flops[1] > 0
    update = trace_update(model, optimizer_for(planned.config, model)).peak[OPTIMIZER]
    assert update_bytes(planned, 2) == pytest.approx(update, rel=0.05)
