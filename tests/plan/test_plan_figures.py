"""A plan from two and three blocks is that of the whole model; what it calls largest fits, and the next does not."""

from dataclasses import replace

import pytest

from nativerank.accounting.hardware import DEVICES
from nativerank.config import GuideConfig, ModelConfig, OptimConfig, ParallelConfig, RankConfig, RunConfig, TrainConfig
from nativerank.plan import figures as room
from nativerank.plan.figures import FEW, Figures, figures, look
from nativerank.plan.memory import bytes_of
from nativerank.plan.passes import full_chunks, resident
from nativerank.plan.roofline import phase_seconds, run_time, step_time
from nativerank.plan.search import largest_batch, largest_rank, rank_bytes
from nativerank.plan.subject import dense_twin, subject


def planned(preset="pocket", device="cpu", devices=None, **groups):
    train = {"steps": 10, "batch_size": 4, **groups.pop("train", {})}
    changes = {"method": groups.pop("method", None)}
    return subject(
        RunConfig(model=ModelConfig(preset=preset), device=device, train=TrainConfig(**train), **changes, **groups),
        devices,
    )


def near(found, whole):
    """Equal nested numbers."""
    if isinstance(whole, dict):
        assert set(found) == set(whole)
        for key in whole:
            near(found[key], whole[key])
    else:
        assert found == pytest.approx(whole, rel=1e-12)


def same_pass(found, whole):
    """Equal to the byte, and as many calls of every operator."""
    assert (found.activations, found.peak) == (whole.activations, whole.peak)
    assert {op: n for op, n in found.calls.items() if n} == whole.calls


@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize("method", ["spectron", "sct", "dense-muon"])
def test_two_blocks_and_a_third_say_what_all_of_them_cost(method, recompute):
    one = planned(method=method, train={"recompute": recompute})
    assert one.equal_blocks() == 4
    whole, few = Figures(*look(one, None, [4])), figures(one)
    for name in ("params", "flops", "held", "update", "update_ops"):
        near(getattr(few, name), getattr(whole, name))
    same_pass(few.traced[4], whole.traced[4])


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("method", ["spectron", "self-guided"])
def test_time_and_flops_are_of_the_same_passes(method, share):
    one = planned(
        method=method, **({"guide": GuideConfig(share=share, stochastic=False)} if "guided" in method else {})
    )
    found = figures(one)
    token, tokens = found.flops["per_token"], 4 * one.context
    done = sum(op.flops * calls for op, calls in found.traced[4].calls.items())
    assert done == pytest.approx(tokens * (token["exact"] + token["of_forward"]["attention"] / 2))  # its scores twice


@pytest.mark.parametrize("preset, sequences, recompute", [("pocket", 24, "up"), ("llama-60m", 6, "blocks")])
def test_two_batches_say_what_more_sequences_hold(preset, sequences, recompute):
    one = planned(preset, train={"batch_size": sequences, "accumulation": 1, "recompute": recompute})
    known = full_chunks(one)
    carried, traced = figures(one, known).at(sequences, known), figures(one).traced[sequences]
    assert known[1] < sequences
    assert (carried.activations, carried.peak) == (traced.activations, traced.peak)


@pytest.mark.parametrize("recompute", ["none", "up", "blocks"])
def test_less_waits_the_more_is_made_again(recompute):
    found = figures(planned(train={"recompute": recompute}))
    none = figures(planned())
    waits, more = found.traced[4].activations, none.traced[4].activations
    assert waits == more if recompute == "none" else waits < 0.7 * more


def test_depth_does_not_change_how_many_models_are_looked_at(monkeypatch):
    looked = []
    monkeypatch.setattr(
        room, "look", lambda planned, depth, counts: looked.append(depth) or look(planned, depth, counts)
    )
    figures(planned("llama3-70b", "cuda", 8, train={"batch_size": 1}))
    assert looked == [FEW, FEW + 1]


def test_shards_divide_what_is_held():
    alone, eight = (
        planned("spectron-s", "cuda", train={"batch_size": 8}),
        planned("spectron-s", "cuda", 8, train={"batch_size": 8}),
    )
    whole, shard = figures(alone), figures(eight)
    assert eight.processes.shards == 8 and resident(eight)
    for name in ("weights", "gradients"):
        assert shard.held[name] == pytest.approx(whole.held[name] / 8, rel=1e-3)
    assert shard.held["gathered"] > 0 == whole.held["gathered"] and shard.sent["gradient_exchange"] > 0
    assert shard.params == whole.params and shard.flops["per_token"] == whole.flops["per_token"]


def test_ddp_on_a_cpu_has_buckets_and_whole_weights():
    found = figures(planned(parallel=ParallelConfig(mode="ddp", replicas=2)))
    assert found.held["buckets"] == found.held["gradients"] == found.held["weights"]


def test_narrow_state_and_layerwise_updates_hold_less():
    plain = figures(planned()).held
    assert figures(planned(optim=OptimConfig(state_dtype="bf16"))).held["optimizer"] < 0.7 * plain["optimizer"]
    layerwise = figures(planned(optim=OptimConfig(layerwise=True, clip=0), train={"accumulation": 1})).held
    assert layerwise["gradients"] < 0.5 * plain["gradients"]


@pytest.mark.parametrize("memory", [60_000_000, 200_000_000])
def test_the_largest_batch_fits_and_the_next_does_not(memory):
    one = planned()
    n = largest_batch(one, figures(one, [4, *full_chunks(one)]), memory)

    def replanned(size):
        again = replace(one, sequences=size)
        return bytes_of(again, figures(again))["peak"]

    assert replanned(n) <= 1.01 * memory and memory < replanned(n + 1)  # chunks of unequal size are not reckoned with


def test_the_largest_rank_fits_and_the_next_does_not():
    one = planned(rank=RankConfig(value=8))
    memory = (rank_bytes(one, 40) + rank_bytes(one, 41)) // 2
    assert largest_rank(one, 128, memory) == 40
    assert largest_rank(one, 128, rank_bytes(one, 128)) == 128


def test_the_twin_is_the_same_run_with_dense_matrices():
    config = RunConfig(method="sct", rank=RankConfig(ratio=0.5), train=TrainConfig(recompute="up", batch_size=2))
    twin = dense_twin(config)
    assert twin is not None and twin.method == "dense-adamw" and twin.rank == RankConfig()
    assert twin.train == replace(config.train, recompute="blocks")
    assert dense_twin(twin) is None


def test_the_roofline_is_the_slower_of_two_bounds():
    device = DEVICES["h200"]
    ops = [
        room.Op("forward", "mm", flops=device.bf16_flops / 2, bytes=1.0, calls=2),
        room.Op("forward", "add", flops=0.0, bytes=2 * device.bytes_per_second),
        room.Op("optimizer", "mm", flops=device.fp32_flops, bytes=0.0),
    ]
    assert phase_seconds(ops, device) == {"forward": 3.0, "optimizer": 1.0}
    found = step_time(ops, device, passes=2, tokens_per_step=70, exact_flops=1e14, world=2, efficiency=0.5)
    assert found["seconds_per_step"] == 14.0 and found["tokens_per_second"] == 5.0
    assert found["optimizer_share"] == pytest.approx(1 / 7)
    assert found["mfu"] == pytest.approx(1e14 * 70 / (14 * 2 * device.bf16_flops))
    assert run_time(36.0, 100, 4, 2.5) == {"hours": 1.0, "device_hours": 4.0, "cost": 10.0}
