"""Training runs on several processes in which ranks change and guides end: as on one, resumed, and set back."""

import pytest
import torch
from training_runs import DDP, FSDP, HSDP, steps, weights

from nativerank.layers.guided import guide_weight
from nativerank.train import step as step_module
from nativerank.train.metrics import read_rows

COMMON = {"train__batch_size": 4, "train__steps": 12, "train__checkpoint_every": 4, "train__eval_every": 5}
# Looks after steps 3, 6, 9 and 12; a checkpoint lies between, and some ranks grow again.
RANKS = COMMON | {
    "rank__value": 9,
    "rank__adapt__threshold": 0.8,
    "rank__adapt__start": 0.25,
    "rank__adapt__every": 0.25,
    "rank__adapt__until": 1.0,
    "rank__adapt__min": 2,
    "rank__adapt__multiple": 1,
    "rank__adapt__hysteresis": 0.0,
}
GUIDED = COMMON | {"method": "self-guided"}  # the guide ends after step 6


def changes(folder):
    return [(row["step"], row["ranks"], row["parameters"]) for row in read_rows(folder) if row.get("event") == "ranks"]


def same_course(found, wanted):
    assert [row["step"] for row in steps(found)] == [row["step"] for row in steps(wanted)]
    for key in ("loss", "val_loss", "train_flops", "guide_alpha"):
        values = [[row[key] for row in steps(folder) if key in row] for folder in (found, wanted)]
        assert values[0] == pytest.approx(values[1], abs=1e-5, rel=1e-6), key
    assert changes(found) == changes(wanted)
    assert weights(found).keys() == weights(wanted).keys()
    for name, value in weights(wanted).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("world", "where", "method"),
    [
        (2, FSDP, "spectron"),
        pytest.param(2, DDP, "spectron", marks=pytest.mark.slow),
        pytest.param(2, FSDP, "stiefel-spectron", marks=pytest.mark.slow),
        pytest.param(2, FSDP, "self-guided", marks=pytest.mark.slow),
        pytest.param(2, DDP, "self-guided", marks=pytest.mark.slow),
        *(
            pytest.param(world, where, method, marks=pytest.mark.slow)
            for world, where in ((2, FSDP), (4, HSDP), (4, DDP))
            for method in ("tsvd", "lowrank-adamw", "sct")
        ),
    ],
    ids=lambda x: x["parallel__mode"] if isinstance(x, dict) else x,
)
def test_ranks_change_as_on_one_process_and_a_killed_run_goes_on(train_on, world, where, method):
    alone = train_on(1, "alone", method=method, **RANKS)
    assert len(changes(alone)) > 1
    straight = train_on(world, "straight", method=method, **RANKS | where)
    same_course(straight, alone)
    train_on(world, "killed", method=method, crash_after=7, **RANKS | where)
    resumed = train_on(world, "killed", method=method, resume="auto", **RANKS | where)
    assert all(torch.equal(x, weights(resumed)[name]) for name, x in weights(straight).items())
    assert changes(resumed) == changes(straight)


@pytest.mark.slow
@pytest.mark.parametrize("algebra", ["gram", "owner"])
@pytest.mark.parametrize("method", ["spectron", "tsvd"])
def test_twenty_steps_in_both_algebras(train_on, method, algebra):
    options = RANKS | {"train__steps": 20, "train__checkpoint_every": 0}
    alone = train_on(1, "alone", method=method, **options)
    for world, where in ((2, FSDP), (2, DDP), (4, FSDP), (4, DDP)):
        name = f"{where['parallel__mode']}-{world}"
        same_course(train_on(world, name, method=method, **options | where | {"parallel__algebra": algebra}), alone)


@pytest.mark.parametrize(
    ("where", "recompute"),
    [
        (FSDP, "none"),
        *(pytest.param(where, "up" if where is FSDP else "none", marks=pytest.mark.slow) for where in (FSDP, DDP)),
    ],
    ids=["fsdp", "fsdp-recompute", "ddp"],
)
def test_guides_end_as_on_one_process_and_a_killed_run_goes_on(train_on, where, recompute):
    options = GUIDED | {"train__recompute": recompute}
    alone = train_on(1, "alone", **options)
    straight = train_on(2, "straight", **options | where)
    same_course(straight, alone)
    for after in (5, 9):  # the checkpoint of step 4 has guides, that of step 8 none
        train_on(2, f"killed-{after}", crash_after=after, **options | where)
        resumed = train_on(2, f"killed-{after}", resume="auto", **options | where)
        assert all(torch.equal(x, weights(resumed)[name]) for name, x in weights(straight).items())


def test_checkpoints_of_other_ranks_are_taken_up_by_another_number_of_processes(train_on):
    straight = train_on(1, "straight", method="spectron", **RANKS)
    train_on(2, "moved", method="spectron", crash_after=9, **RANKS | FSDP)
    moved = train_on(1, "moved", method="spectron", resume="auto", **RANKS)
    same_course(moved, straight)


def spike_at(monkeypatch, number):
    """The loss of one training forward, counted per process, is three times what it is."""
    count, original = [0], step_module.mean_loss

    def spiked(model, *args, **options):
        count[0] += 1
        return original(model, *args, **options) * (3.0 if count[0] == number else 1.0)

    monkeypatch.setattr(step_module, "mean_loss", spiked)


@pytest.mark.parametrize("where", [pytest.param(FSDP, marks=pytest.mark.slow), DDP], ids=["fsdp", "ddp"])
def test_a_rollback_brings_guides_back(train_on, monkeypatch, where):
    spike_at(monkeypatch, 8)
    guard = {"guard__window": 3, "guard__loss_jump": 1.0, "guard__action": "rollback"}
    found = train_on(2, "guided", **GUIDED | guard | where)
    rows = steps(found)
    assert [row["step"] for row in rows] == [*range(1, 9), *range(5, 13)], "step 8 went back to 4, before the end at 6"
    assert all(row["guide_alpha"] == guide_weight(row["step"] - 1, 6) for row in rows)


@pytest.mark.parametrize("where", [FSDP, pytest.param(DDP, marks=pytest.mark.slow)], ids=["fsdp", "ddp"])
def test_a_rollback_brings_ranks_back(train_on, monkeypatch, where):
    guard = {"guard__window": 3, "guard__loss_jump": 1.0, "guard__action": "rollback"}
    spike_at(monkeypatch, 8)
    found = train_on(2, "ranks", method="spectron", **RANKS | guard | where)
    assert [row["step"] for row in steps(found)] == [*range(1, 9), *range(5, 13)]
    events = changes(found)
    assert [step for step, _, _ in events][:3] == [3, 6, 6], "step 6 had its look twice"
    assert events[1][1].keys() & events[2][1].keys()
