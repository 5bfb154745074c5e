"""What a plan says of a step's memory is what a process takes that makes real steps."""

import pytest

from nativerank.cli.plan_table import checked
from nativerank.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from nativerank.plan import check as room
from nativerank.plan.check import check
from nativerank.plan.figures import figures
from nativerank.plan.memory import bytes_of
from nativerank.plan.subject import subject
from nativerank.train.closing import peak_memory_bytes
from nativerank.train.loop import train

# Large enough for tensors to outweigh the process without a model; (preset, sequences of 256 tokens).
SIZES = [("pocket", 32), ("demo", 16), ("llama-60m", 1)]
METHODS = ["spectron", "sct", "dense-adamw"]
CHEAPEST = ("pocket", 32, "dense-adamw")
LINUX = pytest.mark.skipif(peak_memory_bytes(room.torch.device("cpu")) is None, reason="the system does not say")


def planned(preset, method, sequences, context=256, devices=None, **groups):
    train = {"steps": 10, "batch_size": sequences, "accumulation": 1, "context": context, **groups.pop("train", {})}
    model = ModelConfig(preset=preset)
    return subject(RunConfig(model=model, method=method, device="cpu", train=TrainConfig(**train), **groups), devices)


def compared(one):
    """Predicted and measured peak beyond the base, and the base."""
    job = {"config": room.to_dict(one.config), "vocab_size": one.vocab_size}
    found = room.in_a_process(job, room.AT_ONCE)
    return bytes_of(one, figures(one))["peak"], found["peak_bytes"] - found["base_bytes"], found["base_bytes"]


@LINUX
@pytest.mark.parametrize(
    "preset, sequences, method",
    [
        pytest.param(*size, method, marks=[pytest.mark.slow] if (*size, method) != CHEAPEST else [])
        for size in SIZES
        for method in METHODS
    ],
)
def test_peaks_are_within_a_tenth(preset, sequences, method):
    expected, seen, base = compared(planned(preset, method, sequences))
    assert expected + base == pytest.approx(seen + base, rel=0.1)
    assert expected == pytest.approx(seen, rel=0.1)  # without what both have anyway
    assert seen > 0.6 * base


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    "groups",
    [
        {"train": {"loss": "whole", "accumulation": 2}},
        {"train": {"recompute": "up"}},
        {"optim": OptimConfig(layerwise=True, clip=0.0)},
    ],
    ids=["whole", "up", "layerwise"],
)
def test_so_they_are_under_other_policies(groups):
    expected, seen, base = compared(planned("demo", "spectron", 8, **groups))
    assert expected + base == pytest.approx(seen + base, rel=0.1)


def test_a_check_compares_and_says_so(monkeypatch):
    said = {"bytes": {"peak": 900}, "time": {"tokens_per_second": 50.0}}
    answers = {
        True: {"base_bytes": 90, "peak_bytes": 1090, "kept_peak_bytes": 1090, "seconds": 99.0},
        False: {"base_bytes": 80, "peak_bytes": 1500, "kept_peak_bytes": 1500, "seconds": 64.0},
    }
    monkeypatch.setattr(room, "in_a_process", lambda job, environment: answers[bool(environment)])
    found = check(planned("pocket", "spectron", 1), said)
    assert found["peak_bytes"] == {"predicted": 990, "measured": 1090, "ratio": 990 / 1090}
    assert found["beyond_base_bytes"] == {"predicted": 900, "measured": 1000, "ratio": 0.9}
    assert found["tokens_per_second"]["measured"] == 256 / 64 and found["kept_peak_bytes"] == 1500
    assert len(checked(found)) == 3 and checked(None) == []


@LINUX
@pytest.mark.parametrize("source", ["init", "config"])
def test_tokens_of_a_check_are_those_of_the_model(source, run_config, tiny_config, tmp_path, listen):
    if source == "init":  # its tokenizer is no other than that of tokens drawn at random
        train(run_config(out=tmp_path / "run", train__steps=1), listen())
    model = {"init": str(tmp_path / "run")} if source == "init" else {"model": ModelConfig(config=tiny_config)}
    shape = TrainConfig(batch_size=1, accumulation=1, context=16)
    one = subject(RunConfig(method="spectron", device="cpu", train=shape, **model))
    assert one.vocab_size == 300  # not the preset's
    found = room.measure({"config": room.to_dict(one.config), "vocab_size": one.vocab_size})
    assert found["peak_bytes"] > 0 and found["seconds"] > 0


def test_what_cannot_be_checked_here():
    many = planned("pocket", "spectron", 4, devices=2, parallel=ParallelConfig(mode="ddp"))
    with pytest.raises(ValueError, match="one process, and this plan has 2"):
        check(many, {})


def test_a_process_that_ends_early_says_why(monkeypatch):
    monkeypatch.setattr(room, "MODULE", "nativerank.absent")
    with pytest.raises(ValueError, match=r"two steps ended with 1: .*No module named nativerank.absent"):
        room.in_a_process({}, {})
