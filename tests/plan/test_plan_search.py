"""A plan looks at few models; what it calls largest is what a run takes, fits, and is the largest."""

from dataclasses import replace

import pytest

from nativerank.accounting import rule_flops
from nativerank.accounting.hardware import DEVICES, THIS_CPU
from nativerank.config import ModelConfig, ParallelConfig, RankConfig, RunConfig, TrainConfig
from nativerank.layers.base import factor_layers
from nativerank.plan import make
from nativerank.plan.figures import figures
from nativerank.plan.make import Request, make_plan, shared
from nativerank.plan.passes import Stage
from nativerank.plan.search import batch_of, largest_ratio, peak_at_ratio, peak_of
from nativerank.plan.subject import subject


@pytest.mark.slow
def test_a_plan_runs_ten_passes_whatever_the_depth(monkeypatch):
    traced, run = [], Stage.run
    monkeypatch.setattr(Stage, "run", lambda stage, n: traced.append(n) or run(stage, n))
    config = RunConfig(model=ModelConfig(preset="llama3-70b"), train=TrainConfig(recompute="blocks"))
    make_plan(config, Request(on="h100-sxmx64"))
    assert len(traced) == 10  # at 2 and 3 blocks: the run, two other batches, the dense twin, the largest rank


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


def tiny(ratio=0.1, **train):
    train = {"steps": 10, "batch_size": 4, **train}
    return RunConfig(
        model=ModelConfig(preset="pocket"), device="cpu", rank=RankConfig(ratio=ratio), train=TrainConfig(**train)
    )


@pytest.mark.slow
@pytest.mark.parametrize("now", [0.1, 0.8])
def test_the_largest_ratio_fits_and_the_next_does_not(now):
    one = subject(tiny(now))
    report = one.build(3)[1]
    memory = (peak_at_ratio(one, 0.4) + peak_at_ratio(one, 0.41)) // 2
    peak = peak_at_ratio(one, now)
    assert peak_at_ratio(one, 0.41) > peak_at_ratio(one, 0.4)
    assert largest_ratio(one, report, peak, memory) == 0.4
    assert largest_ratio(one, report, peak, peak_at_ratio(one, 1.0)) == 1.0
    assert largest_ratio(one, report, peak, peak_at_ratio(one, 0.01) - 1) == 0.0


@pytest.mark.parametrize(("fit", "size"), [(0, 0), (5, 4), (7, 6), (100, 12)])
def test_the_largest_batch_is_one_that_a_run_takes(fit, size):
    one = subject(tiny(batch_size=2, accumulation=12), 2)  # 24 sequences, 12 of a process
    found = batch_of(one, fit, 10**12)
    assert found["batch_size"] == size
    if size:
        again = subject(tiny(**found), 2)
        assert (again.sequences, again.tokens_per_step) == (size, one.tokens_per_step)


def test_a_smaller_batch_has_gradients_beside_its_passes():
    one = subject(tiny(batch_size=4, accumulation=1))
    smaller = peak_of(replace(one, sequences=2, passes=2))
    assert batch_of(one, 3, smaller)["batch_size"] == 2
    assert batch_of(one, 3, smaller - 1)["batch_size"] == 1


def test_processes_of_one_machine_share_it():
    alone = DEVICES["l4"]
    part = shared(alone, 4)
    for name in ("memory_bytes", "fp32_flops", "bytes_per_second"):
        assert getattr(part, name) == getattr(alone, name) / 4
    assert "divided by its 4 processes" in part.source and shared(alone, 1) is alone


def test_a_plan_without_on_divides_this_machine(monkeypatch):
    monkeypatch.setattr(make, "present_device", lambda: None)
    own = replace(DEVICES["l4"], name=THIS_CPU)
    monkeypatch.setattr(make, "find_device", lambda name: own)
    config = replace(tiny(), parallel=ParallelConfig(mode="fsdp", shards=2))
    assert make_plan(config, Request(search=False))["device"]["memory_bytes"] == own.memory_bytes // 2


@pytest.mark.parametrize("algebra", ["owner", "gram"])
def test_owners_keep_whole_weights_beside_their_shards(algebra):
    one = subject(replace(tiny(), parallel=ParallelConfig(mode="fsdp", shards=2, algebra=algebra)))
    found = figures(one, (one.sequences,)).held
    layers = [m for m in factor_layers(one.build()[0]).values()]
    whole = sum(p.nbytes for layer in layers for p in layer.parameters())
    assert found["owned_copies"] == pytest.approx(whole / 2 if algebra == "owner" else 0)
    assert found["optimizer"] >= found["owned_copies"] + whole / 2  # the momentum of each factor
