"""From torchrun's environment to a grid, and errors that all processes raise and one prints."""

import io
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from nativerank.cli.main import main
from nativerank.data.loader import sequential_batches
from nativerank.data.shards import Dataset
from nativerank.distributed.agree import Agreed, first_difference, first_error, from_first, together, totals
from nativerank.distributed.grid import SINGLE
from nativerank.distributed.start import check_device, grid_shape, start
from nativerank.train.resolve import resolve, share_of_batch
from nativerank.train.signals import SIGNALS, Stopping


@pytest.mark.parametrize(
    ("mode", "replicas", "shards", "world", "nodes", "device", "shape"),
    [
        ("auto", None, None, 1, 1, "cpu", (1, 1)),
        ("fsdp", None, None, 1, 1, "cpu", (1, 1)),
        ("hsdp", None, None, 1, 1, "cpu", (1, 1)),
        ("auto", None, None, 4, 1, "cpu", (4, 1)),
        ("auto", None, None, 4, 1, "cuda", (1, 4)),
        ("auto", 2, None, 8, 1, "cuda", (2, 4)),
        ("ddp", None, None, 3, 1, "cuda", (3, 1)),
        ("fsdp", None, None, 3, 1, "cpu", (1, 3)),
        ("hsdp", None, None, 6, 1, "cpu", (2, 3)),
        ("hsdp", None, None, 32, 4, "cuda", (4, 8)),
        ("hsdp", None, 2, 8, 4, "cpu", (4, 2)),
    ],
)
def test_the_grid_follows_from_the_mode(mode, replicas, shards, world, nodes, device, shape):
    assert grid_shape(mode, replicas, shards, world, nodes, device) == shape


@pytest.mark.parametrize(
    ("mode", "replicas", "shards", "world", "said"),
    [
        ("none", None, None, 2, "one process, but 2"),
        ("hsdp", 3, None, 4, "parallel.replicas 3 does not divide the 4 processes"),
        ("hsdp", 2, 3, 4, "parallel.shards 3 does not divide the 4 processes"),
        ("hsdp", None, None, 3, "but there are 3"),
        ("fsdp", None, 2, 4, "1 replicas x 2 shards"),
        ("ddp", None, 2, 4, "parallel.shards is 1 in mode ddp, got 2"),
        ("fsdp", 2, None, 4, "parallel.replicas is 1 in mode fsdp, got 2"),
        ("auto", None, 3, 2, "parallel.shards 3 does not divide the 2 processes"),
        ("auto", 2, None, 1, "parallel.replicas 2 does not divide the 1 process"),
    ],
)
def test_a_grid_that_cannot_be_names_the_numbers(mode, replicas, shards, world, said):
    with pytest.raises(ValueError, match=said):
        grid_shape(mode, replicas, shards, world)


def test_one_process_needs_no_group():
    with start("fsdp") as grid:
        assert grid is SINGLE
        assert not torch.distributed.is_initialized()
        assert from_first(grid, lambda: 3) == 3
        assert totals([2.0, torch.tensor(3)], grid, torch.device("cpu")) == [2.0, 3.0]
    with pytest.raises(OSError, match="as it was"), together():
        raise OSError("as it was")


def test_the_lowest_rank_is_named():
    assert first_error([None, None]) is None
    assert first_error([None, "no GPU", "no disk"]) == "rank 1: no GPU"
    assert first_error(["no GPU", "no disk"]) == "no GPU"
    alike = {"train.seed": 0, "method": "sct"}
    assert first_difference([alike, alike]) is None
    assert first_difference([alike, alike, alike | {"method": "tsvd"}]).startswith(
        "rank 2 has method tsvd, rank 0 has sct"
    )


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world", "share"),
    [(8, 1, 1, (8, 1)), (8, 4, 1, (8, 4)), (8, 4, 2, (8, 2)), (8, 4, 8, (4, 1)), (6, 5, 3, (5, 2)), (4, 7, 2, (2, 7))],
)
def test_processes_share_a_step_in_the_fewest_passes(run_config, batch_size, accumulation, world, share):
    train = run_config(train__batch_size=batch_size, train__accumulation=accumulation).train
    size, passes = share_of_batch(train, world)
    assert (size, passes) == share
    assert size * passes * world == batch_size * accumulation


def test_a_step_that_cannot_be_shared_names_the_numbers(run_config):
    with pytest.raises(ValueError, match=r"3 sequences .* by 2 processes"):
        share_of_batch(run_config(train__batch_size=3).train, 2)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_read_every_validation_window_once_in_equally_many_batches(prepared, world):
    split = Dataset.open(prepared).split("val")
    wanted = [(i.tolist(), t[v].tolist()) for i, t, v in sequential_batches(split, 16, 4)]
    parts = [list(sequential_batches(split, 16, 4, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    dealt = [batch for rounds in zip(*parts, strict=True) for batch in rounds]
    assert [(i.tolist(), t[v].tolist()) for i, t, v in dealt[: len(wanted)]] == wanted
    assert not any(valid.any() for _, _, valid in dealt[len(wanted) :])


# -- many processes -----------------------------------------------------------------------------------------------


def agreements(rank):
    found = []
    with start("hsdp") as grid:
        found.append((grid.replica, grid.shard, grid.rank == rank))
        found.append(from_first(grid, lambda: f"made by {rank}"))
        found.append(totals([float(rank), 1.0], grid, torch.device("cpu")))
        for failing, error in ((2, ValueError("two")), (0, OSError("zero"))):
            try:
                with together(grid):
                    if rank == failing:
                        raise error
            except (ValueError, OSError) as seen:
                found.append((str(seen), isinstance(seen, Agreed) and seen.silent))

        def fail():
            raise ValueError("nothing was made")

        try:
            from_first(grid, fail)
        except ValueError as seen:
            found.append((str(seen), isinstance(seen, Agreed) and seen.silent))
        stopping = Stopping(lambda: signal.SIGTERM if rank == 3 else None, grid)
        stopping.hear([0.0, 0.0])
        assert stopping() is None
        stopping.ask()
        found.append(stopping())
    with start("fsdp") as grid:  # again, by the same processes
        found.append(totals([1.0], grid, torch.device("cpu")) * grid.shards)
    return found


def timeouts(rank):
    with start("hsdp", timeout=7.0) as grid:
        groups = [grid.everyone, grid.along_shards, grid.along_replicas]
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_rows_and_columns_wait_as_long_as_the_whole_grid(launched):
    assert launched(timeouts, 4) == [[74.0] * 3] * 4


@pytest.mark.parametrize(
    ("own", "gpus", "said"),
    [
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, 1, None),  # a launcher that shows each process its own
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 4, None),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 1, "no GPU of its own: 1 visible for 2 processes"),
        ({"LOCAL_WORLD_SIZE": "2"}, 2, "LOCAL_RANK is not set"),
        ({"LOCAL_WORLD_SIZE": "1"}, 1, None),
    ],
)
def test_every_process_has_a_gpu_of_its_own(monkeypatch, own, gpus, said):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        check_device("cuda")


def test_processes_agree(launched):
    for rank, found in enumerate(launched(agreements, 4)):
        quiet = rank != 0
        assert found == [
            (rank // 2, rank % 2, True),
            "made by 0",
            [6.0, 4.0],
            ("rank 2: two", quiet),
            ("zero", quiet),
            ("nothing was made", quiet),
            SIGNALS[1],
            [4.0] * 4,
        ]


def commands(rank, words, own):
    """(exit code, standard error) of each command, one after the other in the same process."""
    found = []
    for command in words:
        sys.stderr = io.StringIO()
        found.append((main([*command, *(own[rank] if own else ())]), sys.stderr.getvalue()))
    return found


def test_an_error_is_one_line_of_the_first_process_and_ends_all(launched, flags, tmp_path):
    (tmp_path / "file").write_text("")
    cases = {
        "parallel.replicas 3 does not divide": {"parallel__mode": "hsdp", "parallel__replicas": 3},
        "parallel.mode none is one process, but 2": {"parallel__mode": "none"},
        "cannot be shared evenly by 2 processes": {"train__batch_size": 3},
        "nccl needs CUDA": {"device": "cuda"},
        "optim.layerwise is for one process": {"optim__layerwise": "true", "optim__clip": 0},
        "parallel.precision bf16 is for fsdp": {"parallel__mode": "ddp", "parallel__precision": "bf16"},
        "parallel.reduce bf16 with ddp needs CUDA": {"parallel__mode": "ddp", "parallel__reduce": "bf16"},
        "unknown method 'nope'": {"method": "nope"},
        "file is a file": {"out": tmp_path / "file"},
        "is not a prepared data folder": {"data__path": tmp_path},
        "exceeds the model's max_position_embeddings": {"train__context": 65},
        "unknown config key nope": {"nope": 1},
    }
    if torch.cuda.is_available():
        del cases["nccl needs CUDA"]
    words = [["train", *flags(**{"out": tmp_path / "run"} | changes)] for changes in cases.values()]
    first, second = launched(commands, 2, words, None)
    for (code, said), silent, wanted in zip(first, second, cases, strict=True):
        assert code == 2 and wanted in said and said.count("\n") == 1 and said.startswith("nativerank: error: ")
        assert silent == (2, "")
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_ends_all(launched, flags, tmp_path):
    words = [["train", *flags(out=tmp_path / "run")]]
    cases = {
        "rank 1: cannot read": [[], ["--config", str(tmp_path / "none.yaml")]],
        "rank 1 has train.seed 1, rank 0 has 0": [["--train.seed", "0"], ["--train.seed", "1"]],
    }
    for wanted, own in cases.items():
        ((code, said),), silent = launched(commands, 2, words, own)
        assert code == 2 and wanted in said and said.count("\n") == 1
        assert silent == [(2, "")]


def test_a_configuration_is_the_same_for_every_number_of_processes(run_config):
    """What a run folder keeps is what was asked for: another number of processes may go on with it."""
    config = resolve(run_config(out="x", parallel__mode="auto"))
    assert config.parallel.mode == "auto" and config.parallel.replicas is None and Path(config.out).name == "x"
