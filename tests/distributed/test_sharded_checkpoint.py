"""Any number of processes write a checkpoint together and any other reads it, bit for bit.

Pieces are those of real optimizers on FSDP2 and on replicated models, so both algebras' state is among them.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_checkpoints import STATE, built, equal, grid_of, save_on, stored, trained
from torch.distributed.checkpoint import HuggingFaceStorageReader

from nativerank.distributed.grid import SINGLE
from nativerank.train import checkpoint


def part_of(whole, piece):
    return whole if piece.along is None else whole.narrow(piece.along, piece.start, piece.tensor.shape[piece.along])


def take_on(rank, method, replicas, shards, algebra, dtype, source, whole, target):
    """Loads on a grid into a model with other weights, compares what this process holds, and saves it."""
    grid = grid_of(replicas, shards)
    model, optimizer = built(method, grid, algebra, seed=5, dtype=dtype)
    checkpoint.check(source, grid)
    assert checkpoint.load(source, model, checkpoint.contents(model, optimizer, grid), grid) == STATE
    optimizer.loaded()
    tensors = checkpoint.contents(model, optimizer, grid)
    held = set()
    for kind, pieces in tensors.items():
        for piece in pieces:
            if not piece.name.startswith("rng/"):
                expected = whole[f"{kind} {piece.name}"]
                assert tuple(expected.shape) == tuple(piece.shape) and expected.dtype == piece.tensor.dtype
                assert torch.equal(part_of(expected, piece), piece.tensor), piece.name
                held.add(f"{kind} {piece.name}")
    checkpoint.save(target, 1, tensors, STATE, grid)
    return held


@pytest.mark.parametrize("algebra", ["gram", "owner"])
@pytest.mark.parametrize(
    ("method", "dtype"),
    [("spectron", "fp32"), ("spectron", "bf16"), ("sct", "fp32"), ("tsvd", "fp32"), ("dense-muon", "fp32")],
)
def test_a_checkpoint_goes_from_one_to_two_to_four_processes_and_back(forked, tmp_path, method, algebra, dtype):
    model, optimizer = built(method, SINGLE, dtype=dtype)
    trained(model, optimizer)
    saved = checkpoint.save(tmp_path / "0", 1, checkpoint.contents(model, optimizer), STATE)
    whole = stored(saved.path)
    assert {v.dtype for n, v in whole.items() if n.endswith("momentum")} <= {
        {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    }
    for i, (replicas, shards) in enumerate([(1, 2), (2, 2), (1, 4), (2, 1), (1, 1)]):
        source, target = tmp_path / f"{i}/checkpoints/step-000001", tmp_path / str(i + 1)
        found = forked(take_on, replicas * shards, method, replicas, shards, algebra, dtype, source, whole, target)
        assert set.union(*found) == whole.keys()
        if replicas * shards > 1 and method == "spectron" and algebra == "owner":
            assert any(held != whole.keys() for held in found), "state that only its owner has is among it"
        assert equal(stored(target / "checkpoints/step-000001"), whole)
    ends = [tmp_path / f"{i}/checkpoints/step-000001/model.safetensors" for i in (0, 5)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def go_on(rank, method, replicas, shards, algebra, source, steps):
    grid = grid_of(replicas, shards)
    model, optimizer = built(method, grid, algebra, seed=5 if source else 0)
    if source:
        checkpoint.load(source, model, checkpoint.contents(model, optimizer, grid), grid)
        optimizer.loaded()
    else:
        trained(model, optimizer, grid)
    target = Path(steps) / f"{replicas}x{shards}-{bool(source)}"
    before = checkpoint.save(target, 1, checkpoint.contents(model, optimizer, grid), STATE, grid)
    trained(model, optimizer, grid)
    return before.path, checkpoint.save(target, 2, checkpoint.contents(model, optimizer, grid), STATE, grid).path


@pytest.mark.parametrize("algebra", ["gram", "owner"])
@pytest.mark.parametrize(("method", "grid"), [("spectron", (2, 2)), ("tsvd", (2, 1)), ("tsvd", (1, 2))])
def test_training_goes_on_with_the_same_bits(forked, tmp_path, method, grid, algebra):
    world = grid[0] * grid[1]
    (before, after), *_ = forked(go_on, world, method, *grid, algebra, None, tmp_path)
    (again, resumed), *_ = forked(go_on, world, method, *grid, algebra, before, tmp_path)
    assert equal(stored(before), stored(again)) and equal(stored(after), stored(resumed))
    assert not torch.equal(*(next(iter(stored(p).values())) for p in (before, after)))


# -- who reads and writes what ------------------------------------------------------------------------------------


def test_one_process_writes_plain_files(tmp_path, saved):
    path = saved(1, 1)
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    for kind in checkpoint.KINDS:
        with safe_open(path / f"{kind}.safetensors", "pt") as file:
            assert file.metadata() is None
    checkpoint.check(path)
    model, optimizer = built("spectron", SINGLE)
    assert checkpoint.load(path, model, checkpoint.contents(model, optimizer)) == STATE
    assert all(bool((p == 1).all()) for p in model.parameters())


def test_replicas_write_nothing_twice(saved):
    path = saved(2, 2)
    names = [load_file(f).keys() for f in sorted(path.glob("model-*"))]
    assert len(names) == 4 and names[0] and names[1] and not names[2] and not names[3]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["processes"] == 4 and len(manifest["files"]) == 9


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorchs_own_reader_reads_it(saved):
    path = saved(1, 2)
    wanted = {n.split(" ")[1]: v for n, v in stored(path).items()}
    found = {name: torch.full_like(value, 77) for name, value in wanted.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    assert equal(found, wanted)


def hashed_on(rank, shards, path):
    hashed, sha256 = [], checkpoint.sha256_file
    checkpoint.sha256_file = lambda file: hashed.append(file.name) or sha256(file)
    checkpoint.check(path, grid_of(1, shards))
    checkpoint.sha256_file = sha256
    return hashed


def test_every_file_is_hashed_once(forked, saved):
    path = saved(1, 2)
    for shards in (1, 2, 4):
        found = forked(hashed_on, shards, shards, path)
        assert sorted(name for names in found for name in names) == sorted(
            p.name for p in path.iterdir() if p.name != "manifest.json"
        )
        assert max(map(len, found)) == -(-5 // shards)


def random_after_load(rank, replicas, shards, path, seed):
    grid = grid_of(replicas, shards)
    model, optimizer = built("spectron", grid)
    checkpoint.load(path, model, checkpoint.contents(model, optimizer, grid), grid, seed)
    return torch.rand(3)


def test_random_numbers_go_on_where_as_many_processes_do_and_begin_anew_elsewhere(forked, tmp_path):
    wanted = forked(save_on, 2, 1, 2, tmp_path)
    path = tmp_path / "checkpoints/step-000001"
    for grid in ((1, 2), (2, 1)):
        assert torch.equal(torch.stack(forked(random_after_load, 2, *grid, path, 0)), torch.stack(wanted))
    four = torch.stack(forked(random_after_load, 4, 1, 4, path, 0))
    assert torch.equal(four, torch.stack(forked(random_after_load, 4, 2, 2, path, 0)))
    assert len({*map(str, four), *map(str, wanted), str(forked(random_after_load, 1, 1, 1, path, 0)[0])}) == 7
    assert not torch.equal(four, torch.stack(forked(random_after_load, 4, 1, 4, path, 1)))
