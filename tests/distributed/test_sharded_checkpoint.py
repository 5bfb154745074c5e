"""Any number of processes write a checkpoint together and any other reads it, bit for bit, or says what is wrong.

Pieces are those of real optimizers on FSDP2 and on replicated models, so both algebras' state is among them.
"""

import errno
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from nativerank import files
from nativerank.distributed import signs
from nativerank.distributed.grid import SINGLE, make_grid
from nativerank.distributed.pieces import Piece
from nativerank.layers import matrix_parameters
from nativerank.methods import METHODS, build_optimizer, factorize
from nativerank.optim.roles import assign_roles, long_sides
from nativerank.train import checkpoint
from nativerank.train.piece_files import HEADER, Stored
from nativerank.train.saver import Saver

STATE = {"step": 1, "loader": {}, "guard": {}, "best": {}, "data": ""}


def model_of(method, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 19), nn.Tanh(), nn.Linear(19, 16), nn.Linear(16, 4))  # 19 does not divide
    if METHODS[method].layer:
        factorize(model, method, rank=3)
    return model


def built(method, grid, algebra="auto", seed=0, dtype="fp32"):
    """A model on its grid, and its optimizer."""
    model = model_of(method, seed)
    if grid.shards > 1:
        dims = long_sides(assign_roles(model, () if METHODS[method].layer else matrix_parameters(model)))
        placed = {id(p): dims.get(id(p), 0) for p in model.parameters()}
        placed = {id(p): Shard(d if p.shape[d := placed[id(p)]] % grid.shards == 0 else 0) for p in model.parameters()}
        fully_shard(
            model,
            mesh=grid.mesh["shard"] if grid.replicas == 1 else grid.mesh,
            shard_placement_fn=lambda p: placed[id(p)],
        )
    guided = {"guided_steps": 9, "stochastic_guide": False} if METHODS[method].guided else {}
    optimizer = build_optimizer(
        model, method, lr=0.05, aux_lr=0.01, grid=grid, algebra=algebra, state_dtype=dtype, **guided
    )
    return model, optimizer


def trained(model, optimizer, grid=SINGLE, steps=2):
    torch.manual_seed(7)
    for x in torch.randn(steps, 8, 12):
        optimizer.zero_grad()
        model(x.chunk(grid.world)[grid.rank]).square().mean().backward()
        if grid.world > 1 and grid.shards == 1:
            for p in model.parameters():
                dist.all_reduce(p.grad, dist.ReduceOp.AVG)
        optimizer.step()


def grid_of(replicas, shards):
    return make_grid(replicas, shards, "cpu") if replicas * shards > 1 else SINGLE


def part_of(whole, piece):
    return whole if piece.along is None else whole.narrow(piece.along, piece.start, piece.tensor.shape[piece.along])


def stored(folder):
    """Every whole tensor of a checkpoint, generators left out."""
    found = {}
    for kind in checkpoint.KINDS:
        tensors = Stored(sorted(folder.glob(f"{kind}*")))
        wholes = []
        for name, shape in tensors.shapes.items():
            if not name.startswith("rng/"):
                file = tensors._parts[name][0].file
                dtype = load_file(file)[name].dtype
                wholes.append(Piece(name, torch.empty(shape, dtype=dtype), shape))
        tensors.fill(wholes)
        found |= {f"{kind} {p.name}": p.tensor for p in wholes}
    return found


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
    return True


# -- resharding ---------------------------------------------------------------------------------------------------


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


def save_on(rank, replicas, shards, target, background=False, method="spectron", steps=1):
    """`steps` saves, each of other weights."""
    grid = grid_of(replicas, shards)
    model, optimizer = built(method, grid)
    trained(model, optimizer, grid)
    torch.manual_seed(100 + rank)
    saver = Saver(target, grid, background)
    for step in range(1, steps + 1):
        fill_with(model, step)
        saver.save(step, checkpoint.contents(model, optimizer, grid), STATE | {"step": step})
        fill_with(model, -1)  # what comes later does not change it
    saver.wait()
    saver.close()
    return torch.rand(3)


def fill_with(model, value):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


@pytest.fixture
def saved(forked, tmp_path):
    """saved(replicas, shards): the path of a checkpoint that so many processes wrote."""

    def make(replicas=1, shards=2, **options):
        forked(save_on, replicas * shards, replicas, shards, tmp_path / "run", *options.values())
        return tmp_path / "run/checkpoints/step-000001"

    return make


def test_one_process_writes_plain_files_that_version_0_1_would_read(tmp_path, saved):
    path = saved(1, 1)
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    for kind in checkpoint.KINDS:
        with safe_open(path / f"{kind}.safetensors", "pt") as file:
            assert file.metadata() is None
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["processes"]  # version 0.1 had none
    (path / "manifest.json").write_text(json.dumps(manifest))
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


# -- in the background ----------------------------------------------------------------------------------------------


def slowly(delay):
    """The writer of pieces, which takes its time before and after."""
    original = checkpoint.write_pieces

    def write(pieces, file):
        time.sleep(delay)
        original(pieces, file)
        time.sleep(delay)

    return write


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1)])
def test_in_the_background_the_bits_are_the_same(forked, tmp_path, monkeypatch, grid):
    forked(save_on, grid[0] * grid[1], *grid, tmp_path / "sync", False, "spectron", 3)
    monkeypatch.setattr(checkpoint, "write_pieces", slowly(0.05))
    forked(save_on, grid[0] * grid[1], *grid, tmp_path / "async", True, "spectron", 3)
    files = sorted(p.relative_to(tmp_path / "sync") for p in (tmp_path / "sync").rglob("*") if p.is_file())
    assert len(files) == 3 * (2 * grid[0] * grid[1] + 2)
    for file in files:
        assert (tmp_path / "sync" / file).read_bytes() == (tmp_path / "async" / file).read_bytes(), file


def test_a_save_in_the_background_returns_at_once_and_keeps_its_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_pieces", slowly(0.2))
    model, optimizer = built("spectron", SINGLE)
    saver, done, state = Saver(tmp_path, background=True), [], STATE | {"guard": {"in_a_row": 0}}
    began = time.perf_counter()
    saver.save(1, checkpoint.contents(model, optimizer), state, lambda: done.append(1))
    assert time.perf_counter() - began < 0.2 and not done and checkpoint.list_checkpoints(tmp_path) == []
    state["guard"]["in_a_row"] = 5
    buffers = {key: b.data_ptr() for key, b in saver._buffers.items()}
    saver.save(2, checkpoint.contents(model, optimizer), state)
    assert done == [1] and [c.step for c in checkpoint.list_checkpoints(tmp_path)] == [1], "one at a time"
    assert checkpoint.read_state(tmp_path / "checkpoints/step-000001")["guard"] == {"in_a_row": 0}
    assert {key: b.data_ptr() for key, b in saver._buffers.items()} == buffers
    saver.close()
    assert [c.step for c in checkpoint.list_checkpoints(tmp_path)] == [1, 2]


# -- full disks and dead processes ----------------------------------------------------------------------------------


def fill_the_disk(rank, target, background, error, victim):
    """Two saves, of which the second fails on one process, and a third."""
    grid, write = grid_of(1, 2), checkpoint.write_pieces
    model, optimizer = built("spectron", grid)
    saver, said = Saver(target, grid, background), []
    for step in (1, 2, 3):
        if step == 2 and rank == victim:
            checkpoint.write_pieces = lambda pieces, file: (_ for _ in ()).throw(OSError(error, os.strerror(error)))
        try:
            saver.save(step, checkpoint.contents(model, optimizer, grid), STATE)
            saver.wait()
        except ValueError as problem:
            said.append((step, str(problem), saver.failed))
        checkpoint.write_pieces = write
    return said


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_for_one_is_an_error_for_all(forked, tmp_path, background, victim):
    found = forked(fill_the_disk, 2, tmp_path, background, errno.ENOSPC, victim)
    for ((step, line, failed),) in found:
        assert step == 2 and "disk full while writing" in line and "step-000002" in line and not failed
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000003"]
    for path in (tmp_path / "checkpoints").iterdir():
        checkpoint.check(path)


def test_a_disk_that_not_all_share_is_named(forked, tmp_path):
    for ((_, line, _),) in forked(fill_the_disk, 2, tmp_path, False, errno.ENOENT, 1):
        assert "is not on a disk that all processes share" in line


def test_whoever_waits_for_a_save_shows_where_its_thread_is(tmp_path, monkeypatch):
    """A save that is long must not look like a process that stands still."""
    seen = []

    def look(*args):
        thread = threading.get_ident()
        until = time.monotonic() + 30
        while not signs.AWAITED:
            assert time.monotonic() < until
            time.sleep(0.001)
        seen.append((list(signs.AWAITED) == [thread], threading.main_thread().ident != thread))

    monkeypatch.setattr(checkpoint, "write_pieces", look)
    saver = Saver(tmp_path, background=True)
    saver.save(1, {"model": []}, STATE)
    with pytest.raises(ValueError, match="not on a disk"):
        saver.wait()  # nothing was written
    assert seen == [(True, True)] and signs.AWAITED == []
    saver.close()


def test_an_error_in_the_background_is_known_before_the_next_save(tmp_path, monkeypatch):
    def full(pieces, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_pieces", full)
    model, optimizer = built("spectron", SINGLE)
    saver = Saver(tmp_path, background=True)
    saver.save(1, checkpoint.contents(model, optimizer), STATE)
    saver.close()
    assert saver.failed
    with pytest.raises(ValueError, match="disk full"):
        saver.wait()
    assert not saver.failed and list((tmp_path / "checkpoints").iterdir()) == []


def save_until_killed(rank, folder, background):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    grid = grid_of(1, 2)
    model, optimizer = built("spectron", grid)
    saver = Saver(folder, grid, background)
    try:
        for step in range(1, 1000):
            fill_with(model, step)
            saver.save(step, checkpoint.contents(model, optimizer, grid), STATE | {"step": step})
            fill_with(model, -1)
    except RuntimeError:
        saver.close()
        os._exit(3)  # the other one is gone


MOMENTS = {
    "the folder": ".step-000003.partial-*",
    "a file of the first": ".step-000003.partial-*/model-00000*",
    "a file of the second": ".step-000003.partial-*/optimizer-00001*",
    "the manifest": ".step-000003.partial-*/manifest.json",
    "its name": "step-000003",
}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_of_one_process_leaves_complete_checkpoints(tmp_path, monkeypatch, moment, victim):
    """Moments are far enough apart to be met."""
    sync = files.sync
    monkeypatch.setattr(files, "sync", lambda path: (time.sleep(0.01), sync(path)))
    monkeypatch.setattr(checkpoint, "write_pieces", slowly(0.01))
    context = mp.start_processes(save_until_killed, (tmp_path, True), 2, join=False, start_method="fork")
    pids, until = context.pids(), time.monotonic() + 60
    while not any((tmp_path / "checkpoints").glob(MOMENTS[moment])):
        assert time.monotonic() < until
    os.kill(pids[victim], signal.SIGKILL)
    with pytest.raises(mp.ProcessExitedException):
        context.join(timeout=60)
    assert time.monotonic() < until, "the other one hangs"
    found = checkpoint.list_checkpoints(tmp_path)
    assert [c.step for c in found[:2]] == [1, 2] and len(found) in (2, 3, 4)
    for c in found:
        checkpoint.check(c.path)
        model, optimizer = built("spectron", SINGLE)
        state = checkpoint.load(c.path, model, checkpoint.contents(model, optimizer))
        assert state["step"] == c.step and all(bool((p == c.step).all()) for p in model.parameters())
    checkpoint.save(tmp_path, 9, checkpoint.contents(model, optimizer), STATE)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")], "a later save cleans up"


# -- damage -----------------------------------------------------------------------------------------------------------


def rewrite(path, name, change):
    """A file whose tensors or header become others, and whose hash says that all is well."""
    with safe_open(path / name, "pt") as file:
        header = json.loads(file.metadata()[HEADER])
    tensors = load_file(path / name)
    change(tensors, header)
    save_file(tensors, path / name, {HEADER: json.dumps(header)})
    vouch(path, name)


def vouch(path, name):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {
        "sha256": checkpoint.sha256_file(path / name), "bytes": (path / name).stat().st_size
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))


def set_processes(path, number):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"processes": number}))


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


SECOND = "model-00001-of-00002.safetensors"
DAMAGES = {
    "truncated": (lambda c: (c / SECOND).write_bytes((c / SECOND).read_bytes()[:-9]), f"{SECOND} is missing or trunc"),
    "missing": (lambda c: (c / SECOND).unlink(), f"{SECOND} is missing"),
    "a bit": (lambda c: flip_a_bit(c / SECOND), f"the hash of {SECOND} differs"),
    "of another process": (
        lambda c: (c / SECOND).write_bytes((c / SECOND.replace("00001", "00000", 1)).read_bytes()),
        f"(the hash of {SECOND} differs|{SECOND} is missing or truncated)",
    ),
    "foreign": (lambda c: (c / "model-00002-of-00002.safetensors").write_bytes(b""), "holds model-00002-of-00002"),
    "a pickle": (lambda c: (c / "model.pt").write_bytes(b""), "holds model.pt"),
    "too few": (lambda c: set_processes(c, 1), "not a complete checkpoint"),
    "too many": (lambda c: set_processes(c, 3), "not a complete checkpoint"),
    "none": (lambda c: set_processes(c, 0), "not a complete checkpoint"),
    "a word": (lambda c: set_processes(c, "two"), "not a complete checkpoint"),
    "unread": (
        lambda c: ((c / SECOND).write_bytes(b"x" * 50), vouch(c, SECOND)),
        f"cannot read .*{SECOND}",
    ),
    "a gap": (
        lambda c: rewrite(c, SECOND, lambda tensors, header: tensors.pop("0.up.bias")),
        "the pieces of 0.up.bias leave a gap or overlap",
    ),
    "an overlap": (
        lambda c: rewrite(c, SECOND, lambda tensors, header: header["0.up.bias"].update(saved_offsets=[0])),
        "the pieces of 0.up.bias leave a gap or overlap",
    ),
    "a piece too long": (
        lambda c: rewrite(c, SECOND, lambda tensors, header: tensors.update({"0.up.bias": torch.zeros(12)})),
        "the pieces of 0.up.bias leave a gap or overlap",
    ),
    "another whole": (
        lambda c: rewrite(c, SECOND, lambda tensors, header: header["0.up.bias"].update(shape=[20])),
        r"0\.up\.bias is \(20,\) there and \(19,\) elsewhere",
    ),
    "no place": (
        lambda c: rewrite(c, SECOND, lambda tensors, header: header.pop("0.up.bias")),
        f"{SECOND} is damaged: its header does not say",
    ),
    "a place before the start": (
        lambda c: rewrite(c, SECOND, lambda tensors, header: header["0.up.bias"].update(saved_offsets=[-1])),
        f"{SECOND} is damaged: its header does not say",
    ),
    "a tensor more": (
        lambda c: rewrite(
            c,
            SECOND,
            lambda tensors, header: (
                tensors.update(bonus=torch.zeros(2)), header.update(bonus={"saved_offsets": [0], "shape": [2]})
            ),
        ),
        "holds bonus, which the model does not have",
    ),
}  # fmt: skip


def load_damaged(rank, shards, path):
    grid = grid_of(1, shards)
    model, optimizer = built("spectron", grid)
    try:
        checkpoint.check(path, grid)
        checkpoint.load(path, model, checkpoint.contents(model, optimizer, grid), grid)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_by_all(forked, saved, damage):
    path = saved(1, 2)
    act, words = DAMAGES[damage]
    act(path)
    for shards in (1, 2):
        for line in forked(load_damaged, shards, shards, path):
            assert re.search(words, line), line


def load_another(rank, path, method, rank_of):
    grid = grid_of(1, 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 19), nn.Tanh(), nn.Linear(19, 16), nn.Linear(16, 4))
    factorize(model, method, rank=rank_of)
    fully_shard(model, mesh=grid.mesh["shard"])
    optimizer = build_optimizer(model, method, lr=0.05, aux_lr=0.01, grid=grid, algebra="owner")
    try:
        checkpoint.load(path, model, checkpoint.contents(model, optimizer, grid), grid)
    except ValueError as error:
        return str(error)


def test_a_checkpoint_of_another_model_is_named_by_all(forked, saved):
    path = saved(1, 2)
    for line in forked(load_another, 2, path, "spectron", 2):
        assert "0.down.weight has shape (3, 12), expected (2, 12)" in line
    for line in forked(load_another, 2, path, "lowrank-adamw", 3):
        assert "lacks 0.down.weight/exp_avg" in line and "exp_avg" in line


def choose(rank, run, damaged):
    grid = grid_of(1, 2)
    said = []
    path, newest = checkpoint.find(run, "auto", said.append, grid)
    return path, newest, said


def test_all_processes_choose_the_same_checkpoint(forked, tmp_path):
    forked(save_on, 2, 1, 2, tmp_path, True, "spectron", 3)
    newest = tmp_path / "checkpoints/step-000003"
    assert [path for path, _, _ in forked(choose, 2, tmp_path, None)] == [newest] * 2
    flip_a_bit(newest / SECOND)
    found = forked(choose, 2, tmp_path, None)
    assert [(path.name, c.step) for path, c, _ in found] == [("step-000002", 2)] * 2
    for _, _, (line,) in found:
        assert f"the hash of {SECOND} differs" in line and line.endswith("falling back to step-000002")
