"""Training runs whose replicas meet every few steps: forked processes that call `train` as torchrun's would."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import HSDP, Quiet, start_all, steps, train_as, weights

from nativerank.config import DilocoConfig, ParallelConfig
from nativerank.distributed.grid import Grid
from nativerank.train.diloco import check_diloco, notes
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows
from nativerank.train.resolve import resolve

DILOCO = {
    "parallel__diloco__every": 2,
    "train__batch_size": 4,
    "train__eval_every": 4,
    "train__checkpoint_every": 4,
    "train__probe_every": 2,
}


@pytest.fixture
def trained(train_on):
    """trained(world, name, **changes): the folder of a run whose replicas meet."""
    return lambda world, name="run", **changes: train_on(world, name, **DILOCO | changes)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("stiefel-spectron", "tsvd", "self-guided")]


@pytest.mark.parametrize("method", ["spectron", *SLOW])
def test_replicas_meet_and_the_run_goes_on_as_if_nothing_had_killed_it(trained, method):
    straight = trained(2, "straight", method=method)
    rows = steps(straight)
    assert [row["step"] for row in rows if "outer" in row] == [2, 4, 6, 8]
    for row in rows:
        if "outer" in row:
            assert row["outer"]["update_norm"] > 0 and row["outer"]["factor_gap"] > 0
            assert set(row["outer"]["pairs"]) == set(row["probes"])
    assert [row["step"] for row in rows if "val_loss" in row] == [4]
    trained(2, "killed", method=method, crash_after=7)
    resumed = trained(2, "killed", method=method, resume="auto")
    assert all(torch.equal(x, weights(resumed)[name]) for name, x in weights(straight).items())
    assert [row["loss"] for row in steps(resumed)][-4:] == [row["loss"] for row in rows][-4:]


def test_the_last_round_may_be_shorter(trained):
    rows = steps(trained(2, train__steps=7, train__eval_every=0, train__checkpoint_every=0))
    assert [row["step"] for row in rows if "outer" in row] == [2, 4, 6, 7]


@pytest.mark.parametrize(
    ("momentum", "steps", "said"),
    [
        (0.9, 199, ["has 100 meetings .*momentum 0.9, which remembers 10: .* 0.5 was better"]),
        (0.9, 30, ["has 15 meetings"]),
        (0.9, 200, []),  # 10 / (1 - 0.9) meetings of every second step
        (0.8, 98, ["has 49 meetings .* which remembers 5:"]),
        (0.5, 2, []),
        (0.0, 2, []),
    ],
)
def test_a_momentum_that_is_long_for_the_run_is_noted(run_config, momentum, steps, said):
    config = run_config(**DILOCO | {"parallel__diloco__momentum": momentum})
    found = notes(config, steps)
    assert len(found) == len(said) and all(re.search(*pair) for pair in zip(said, found, strict=True))
    assert notes(run_config(parallel__diloco__momentum=momentum), steps) == [], "nobody meets"


class Told(Quiet):
    """Keeps what a start says."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def begin(self, facts):
        (self.folder / "warnings.json").write_text(json.dumps(facts["warnings"]))


def test_the_start_says_so(run_config, tmp_path):
    start_all(train_as, 2, run_config(out=tmp_path / "run", **DILOCO), Told(tmp_path))
    (first, *_) = json.loads((tmp_path / "warnings.json").read_text())
    assert "4 meetings" in first


class Traffic(TorchDispatchMode):
    """Counts the bytes that leave this process, with a ring for all-reduces."""

    def __init__(self):
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if func.name() == "c10d::allreduce_":
            self.sent += 2 * (world - 1) / world * sum(x.nbytes for x in args[0])
        elif func.name() == "c10d::alltoall_base_":
            self.sent += sum(n for rank, n in enumerate(args[4]) if rank != torch.distributed.get_rank())
        elif func.namespace == "c10d" and func.name().split("::")[1] in ("_reduce_scatter_base_", "_allgather_base_"):
            raise AssertionError(f"{func.name()} is not counted")
        return func(*args, **kwargs or {})


def counting_worker(rank, world, port, config, folder):
    with Traffic() as traffic:
        train_as(rank, world, port, config, Quiet())
    (folder / f"sent-{rank}").write_text(str(traffic.sent))


@pytest.mark.parametrize("every", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_per_token_fall_by_the_length_of_a_round(run_config, tmp_path, every):
    still = {"train__steps": 16, "train__eval_every": 0, "train__checkpoint_every": 0, "train__probe_every": 0}
    sent = []
    for name, value in (("together", 0), ("apart", every)):
        config = run_config(out=tmp_path / name, **DILOCO | still | {"parallel__diloco__every": value})
        folder = tmp_path / f"sent-{name}"
        folder.mkdir()
        start_all(counting_worker, 2, config, folder)
        sent.append(sum(float(file.read_text()) for file in folder.iterdir()))
    weight_bytes = sum(x.nbytes for x in weights(tmp_path / "together").values())
    assert sent[0] >= 16 * 2 * weight_bytes  # so that all of it was seen
    assert sent[0] / sent[1] == pytest.approx(every, rel=0.2)  # less: theta_0 once, numbers at every step


@pytest.mark.slow
def test_replicas_of_shards(trained):
    whole = trained(2, "whole")
    sharded = trained(4, "sharded", **HSDP)
    for one, other in zip(steps(whole), steps(sharded), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        if "outer" in one:
            assert one["outer"]["factor_gap"] == pytest.approx(other["outer"]["factor_gap"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "mesh"), [(2, {}), (4, HSDP)])
def test_ranks_change_at_meetings_only(trained, world, mesh):
    adapt = mesh | {
        "rank__adapt__threshold": 0.7,
        "rank__adapt__start": 0.3,
        "rank__adapt__every": 0.3,
        "rank__adapt__min": 2,
        "rank__adapt__multiple": 1,
        "rank__value": 12,
    }
    folder = trained(world, **adapt)
    changes = [row for row in read_rows(folder) if row.get("event") == "ranks"]
    assert changes and {row["step"] % 2 for row in changes} == {0}
    resumed = trained(world, "resumed", **adapt, crash_after=7)
    assert trained(world, "resumed", resume="auto", **adapt) == resumed
    assert all(torch.equal(x, weights(resumed)[name]) for name, x in weights(folder).items())


def test_another_number_of_replicas_cannot_take_it_up(trained, run_config, tmp_path):
    folder = trained(2)
    state = json.loads((Path(folder) / "checkpoints" / "step-000008" / "state.json").read_text())
    assert state["optimizers"] == 2
    with pytest.raises(ValueError, match="holds 2 optimizers of replicas on their own, this run has 1"):
        train(run_config(out=tmp_path / "other", resume=folder / "checkpoints" / "step-000008"), Quiet())


@pytest.mark.parametrize(
    ("changes", "replicas", "message"),
    [
        ({"train__eval_every": 5}, 2, "train.eval_every 5 is no multiple of parallel.diloco.every 2.*take 6"),
        ({"train__checkpoint_every": 3}, 2, "train.checkpoint_every 3 is no multiple"),
        ({}, 1, "parallel.diloco.every 2 is for replicas.*--parallel.replicas"),
        ({"parallel__diloco__every": 0, "parallel__diloco__lr": 0.5}, 2, "parallel.diloco.lr has no meaning"),
        ({"parallel__diloco__cap": 1.0, "method": "lowrank-adamw"}, 2, "parallel.diloco.cap 1.0 counts in optim.lr"),
        ({"parallel__diloco__momentum": 1.0}, 2, "parallel.diloco.momentum must not be 1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(run_config, changes, replicas, message):
    config = resolve(run_config(**{"method": "spectron"} | DILOCO | changes))
    with pytest.raises(ValueError, match=message):
        check_diloco(config, Grid(replicas=replicas))


def test_without_meetings_nothing_is_asked(run_config):
    config = resolve(run_config())
    check_diloco(config, Grid())
    check_diloco(replace(config, parallel=ParallelConfig(diloco=DilocoConfig())), Grid(replicas=3))
