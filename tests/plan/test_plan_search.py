"""A plan looks at few models; what it calls largest is what a run takes, fits, and is the largest."""

from nativerank.accounting import rule_flops
from nativerank.config import ModelConfig, RunConfig, TrainConfig
from nativerank.plan import figures as room
from nativerank.plan.make import Request, make_plan
from nativerank.plan.passes import trace


def test_a_plan_runs_eight_passes_whatever_the_depth(monkeypatch):
    traced = []
    monkeypatch.setattr(room, "trace", lambda *args: traced.append(args) or trace(*args))
    config = RunConfig(model=ModelConfig(preset="llama3-70b"), train=TrainConfig(recompute="blocks"))
    make_plan(config, Request(on="h100-sxmx64"))
    assert len(traced) == 8  # at 2 and 3 blocks: the run at two batches, its dense twin, the largest rank


def test_an_update_rule_is_looked_at_once(monkeypatch):
    options = {"rule": "muon", "lr": 0.1, "state_dtype": "fp32", "nesterov": True, "momentum": 0.95}
    options |= {
        "orthogonalizer": "newton-schulz",
        "orthogonalizer_steps": 5,
        "shape_scale": "none",
        "weight_decay": 0.0,
    }
    first = rule_flops.unit_ops([(48, 32)], options)
    assert rule_flops.unit_ops([(48, 32)], {**options, "params": [1]}) is first
    assert rule_flops.unit_flops([(48, 32)], {**options, "orthogonalizer_steps": 6}) > rule_flops.unit_flops(
        [(48, 32)], options
    )
