"""A pass on tensors without numbers holds and makes what the same pass does on real ones."""

import pytest
import torch

from nativerank.accounting.trace import BACKWARD, FORWARD, OPTIMIZER, trace_step, trace_update
from nativerank.config import ModelConfig, RunConfig, TrainConfig
from nativerank.evaluate.head_loss import takes_chunks
from nativerank.evaluate.loss import mean_loss
from nativerank.models import materialize
from nativerank.plan.passes import Stage
from nativerank.plan.subject import subject
from nativerank.train.setup import optimizer_for


@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize("method", ["spectron", "sct", "dense-muon"])
def test_without_numbers_as_with_them(method, recompute):
    train = TrainConfig(steps=1, batch_size=2, accumulation=1, context=64, recompute=recompute)
    planned = subject(RunConfig(model=ModelConfig(preset="pocket"), method=method, device="cpu", train=train))
    model = materialize(planned.build(2, to_run=True)[0], seed=0, init_scale=1.0)
    assert takes_chunks(model)  # asked before, since that is a pass, too
    ids = torch.randint(planned.vocab_size, (2, 64))
    real = trace_step(model, lambda m: mean_loss(m, ids, ids))
    stage = Stage(planned, 2)
    made = stage.run(2)
    assert made.held == pytest.approx(real.held, rel=0.005)  # the ids, scalars of checkpoints
    for phase in (FORWARD, BACKWARD):
        assert made.peak[phase] == pytest.approx(real.peak[phase], rel=0.02), phase
    flops = [sum(op.calls * op.flops for op in found.ops) for found in (made, real)]
    assert flops[0] == flops[1] > 0
    update = trace_update(model, optimizer_for(planned.config, model)).peak[OPTIMIZER]
    assert stage.update_bytes() == pytest.approx(update, rel=0.05)
