"""What is wrong with a checkpoint is said alike by all processes that read it; a damaged one is passed over by all."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded_checkpoints import built, grid_of, save_on
from torch import nn
from torch.distributed.fsdp import fully_shard

from nativerank.methods import build_optimizer, factorize
from nativerank.train import checkpoint
from nativerank.train.piece_files import HEADER


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
