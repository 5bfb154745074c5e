"""A checkpoint is complete or not there, holds no code, and a damaged one costs no more than itself."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from safetensors.torch import load_file

from nativerank.cli.main import main
from nativerank.distributed.pieces import Piece
from nativerank.methods import build_optimizer
from nativerank.train import checkpoint, generators
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows
from nativerank.train.piece_files import Stored


@pytest.fixture
def crashed(tmp_path, run_config, listen, crash):
    """A run folder with checkpoints at 2, 4 and 6 that crashed after step 7 of 8."""
    out = tmp_path / "run"
    with pytest.raises(crash):
        train(run_config(out=out, train__checkpoint_every=2, train__keep=3), listen(crash_after=7))
    assert [c.step for c in checkpoint.list_checkpoints(out)] == [2, 4, 6]
    return out


@pytest.fixture
def resume(crashed, run_config, listen):
    """resume(): goes on with the crashed run; returns the listener."""

    def go(**changes):
        listener = listen()
        common = dict(out=crashed, resume="auto", train__checkpoint_every=2, train__keep=3)
        train(run_config(**common | changes), listener)
        return listener

    return go


@pytest.fixture
def straight(tmp_path, run_config, listen, fingerprint, known={}):  # noqa: B006  # computed once
    """Hashes of weights and optimizer at the end of the run that did not crash."""
    if not known:
        train(run_config(out=tmp_path / "straight"), listen())
        known[0] = fingerprint(tmp_path / "straight", 8)[:2]
    return known[0]


class RunsCode:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def step(run, number):
    return run / "checkpoints" / f"step-{number:06d}"


DAMAGES = {
    "truncated weights": lambda c: truncate(c / "model.safetensors"),
    "empty weights": lambda c: (c / "model.safetensors").write_bytes(b""),
    "a bit of the weights": lambda c: flip_a_bit(c / "model.safetensors"),
    "a bit of the optimizer": lambda c: flip_a_bit(c / "optimizer.safetensors"),
    "a bit of the state": lambda c: flip_a_bit(c / "state.json"),
    "no optimizer": lambda c: (c / "optimizer.safetensors").unlink(),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "half a manifest": lambda c: truncate(c / "manifest.json"),
    "a manifest of another shape": lambda c: (c / "manifest.json").write_text("[]"),
    "a foreign file": lambda c: (c / "notes.txt").write_text("hello"),
    "a file in place of the folder": lambda c: (shutil.rmtree(c), c.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_and_says_so(crashed, resume, fingerprint, straight, damage):
    DAMAGES[damage](step(crashed, 6))
    if step(crashed, 6).is_file():
        step(crashed, 6).rename(crashed / "checkpoints" / "step-000007")  # no later save will take its place
    listener = resume()
    assert listener.facts["step"] == 4
    (message,) = listener.said
    assert "step-00000" in message and message.endswith("falling back to step-000004")
    (row,) = [r for r in read_rows(crashed) if r.get("event") == "checkpoint_damaged"]
    assert row["reason"] == message
    assert fingerprint(crashed, 8)[:2] == straight
    assert [r["step"] for r in read_rows(crashed) if "loss" in r] == list(range(1, 9))


def test_all_damaged_is_one_clear_error_and_changes_nothing(crashed, resume, cli, flags):
    for number in (2, 4, 6):
        flip_a_bit(step(crashed, number) / "model.safetensors")
    before = {p: p.stat().st_mtime_ns for p in crashed.rglob("*")}
    result = cli("train", *flags(out=crashed, resume="auto", train__checkpoint_every=2, train__keep=3))
    assert result.code == 2 and result.out == ""
    assert result.err.count("\n") == 1 and "no usable checkpoint among 3" in result.err and "step-000006" in result.err
    assert {p: p.stat().st_mtime_ns for p in crashed.rglob("*")} == before


def test_a_damaged_checkpoint_by_path_is_an_error(crashed, cli, flags):
    flip_a_bit(step(crashed, 6) / "model.safetensors")
    common = dict(train__checkpoint_every=2, train__keep=3)
    for out in (crashed, crashed.with_name("elsewhere")):
        result = cli("train", *flags(out=out, resume=step(crashed, 6), **common))
        assert result.code == 2 and result.err.count("\n") == 1
        assert "step-000006 is damaged: the hash of model.safetensors differs" in result.err
    assert not crashed.with_name("elsewhere").exists()


@pytest.mark.parametrize("name", ["payload.pt", "payload.pkl", "model.safetensors", "state.json"])
def test_a_pickle_is_refused_and_does_not_run(crashed, resume, name):
    """Even one whose hash is in the manifest, as whoever hands on a run folder could arrange."""
    folder, proof = step(crashed, 6), crashed / "code-ran"
    bomb = pickle.dumps(RunsCode(proof))
    if name.endswith(".pt"):
        torch.save(RunsCode(proof), folder / name)
    else:
        (folder / name).write_bytes(bomb)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"sha256": checkpoint.sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
    manifest["files"][name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        listener = resume()
        assert listener.facts["step"] == 4 and "payload" in listener.said[0]
    except ValueError as error:  # its hashes are right and its name is one of ours: found out at reading
        assert name in str(error)
    assert not proof.exists()


def test_the_pickle_of_that_test_would_run(tmp_path):
    pickle.loads(pickle.dumps(RunsCode(tmp_path / "code-ran")))
    assert (tmp_path / "code-ran").exists()


def test_a_half_written_folder_is_never_taken_for_a_checkpoint(crashed, resume):
    partial = crashed / "checkpoints" / ".step-000008.partial-abc"
    shutil.copytree(step(crashed, 6), partial)
    (partial / "manifest.json").unlink()
    listener = resume()
    assert listener.facts["step"] == 6 and listener.said == []
    assert not partial.exists(), "the next save removes it"


def save_again_and_die(out, renames):
    """Saves step 1 with other weights; kill -9 after so many renames."""
    rename, done = os.rename, []

    def until_killed(source, target):
        rename(source, target)
        done.append(target)
        if len(done) == renames:
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = until_killed
    checkpoint.save(out, 1, {"model": [piece(2.0)], "optimizer": []}, STATE)


def piece(value):
    return Piece("w", torch.full((3,), value), (3,))


STATE = dict.fromkeys(checkpoint.STATE_KEYS, 0) | {"step": 1}


@pytest.mark.parametrize(("renames", "value"), [(1, 1.0), (2, 2.0)])
def test_a_step_that_is_saved_again_is_there_whenever_the_save_is_killed(tmp_path, renames, value):
    checkpoint.save(tmp_path, 1, {"model": [piece(1.0)], "optimizer": []}, STATE)
    process = multiprocessing.get_context("fork").Process(target=save_again_and_die, args=(tmp_path, renames))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    # The first rename has moved the old one aside, the second has given the new one its name.
    assert (tmp_path / "checkpoints" / "step-000001").exists() == (renames == 2)
    found = checkpoint.newest_usable(tmp_path, pytest.fail)
    assert found is not None and found.step == 1
    assert load_file(found.path / "model.safetensors")["w"].tolist() == [value] * 3
    checkpoint.save(tmp_path, 2, {"model": [piece(3.0)], "optimizer": []}, STATE)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"], "the next save gives it its name back and removes the rest"
    (first, _) = checkpoint.list_checkpoints(tmp_path)
    checkpoint.check(first.path)
    assert load_file(first.path / "model.safetensors")["w"].tolist() == [value] * 3


def test_the_newest_and_the_best_stay(tmp_path, run_config, listen, monkeypatch):
    losses = iter([3.0, 2.0, 1.0, 2.5, 2.6, 2.7, 0.5])  # by validations at 2, 4, 6, 8, 10, 12 and the end
    loss = type("Loss", (), dict(perplexity=1.0, bits_per_byte=1.0, tokens=1))

    def validate(self, max_tokens, between=None):
        result = loss()
        result.nats = next(losses)
        return result

    monkeypatch.setattr("nativerank.train.loop.Run._validate", validate)
    # Step 6 has the best loss of all but no checkpoint; of those with one, step 4's is the best.
    common = dict(train__steps=14, train__eval_every=2, train__checkpoint_every=4, train__keep=2)
    train(run_config(out=tmp_path / "run", **common), listen())
    assert [c.step for c in checkpoint.list_checkpoints(tmp_path / "run")] == [4, 12, 14]
    state = checkpoint.read_state(step(tmp_path / "run", 14))
    assert state["best"] == {"loss": 2.0, "step": 4}, "the loss on the whole split is no rival of those on a part"


def test_a_damaged_newer_checkpoint_does_not_count_when_old_ones_are_removed(crashed, run_config, listen, crash):
    """Else keep 1 would remove the good one just written and leave the damaged one."""
    flip_a_bit(step(crashed, 6) / "model.safetensors")
    common = dict(out=crashed, resume="auto", train__keep=1)
    with pytest.raises(crash):
        train(run_config(train__checkpoint_every=5, **common), listen(crash_after=6))
    usable = checkpoint.newest_usable(crashed, lambda message: None)
    assert usable is not None and usable.step == 5


def test_no_checkpoint_holds_weights_that_are_not_finite(tmp_path, run_config, listen, built):
    out = tmp_path / "run"

    def poison():
        with torch.no_grad():
            built[0].model.lm_head.weight[0, 0] = float("nan")

    listener = listen(at_step={4: poison})
    with pytest.raises(ValueError, match=r"step 4: the weights are not finite any more; .*step-000002"):
        train(run_config(out=out, train__checkpoint_every=2), listener)
    assert [c.step for c in checkpoint.list_checkpoints(out)] == [2]


@pytest.mark.parametrize(("victim", "of_a_save"), [("write_pieces", 2), ("sync", 4)])
def test_a_full_disk_leaves_the_earlier_ones(tmp_path, cli, flags, monkeypatch, victim, of_a_save):
    calls, original = [], getattr(checkpoint, victim)

    def fails_at_the_second_save(*args):
        calls.append(1)
        if len(calls) > of_a_save:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(checkpoint, victim, fails_at_the_second_save)
    out = tmp_path / "run"
    result = cli("train", *flags(out=out, train__checkpoint_every=3), "--quiet")
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith("nativerank: error: disk full")
    assert [c.step for c in checkpoint.list_checkpoints(out)] == [3]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000003"]
    monkeypatch.undo()
    assert cli("train", *flags(out=out, train__checkpoint_every=3, resume="auto")).code == 0


def train_within(limit, flags, said):
    """A run that may write files of so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        code = main(["train", *flags])
    sys.exit(code)


def test_a_real_file_size_limit_is_the_same_error(tmp_path, flags):
    """The operating system refuses to write on, in a process of its own: no patched function stands in for it."""
    out, said = tmp_path / "run", tmp_path / "said"
    out.mkdir()
    words = [*flags(out=out, train__checkpoint_every=3), "--quiet"]
    process = multiprocessing.get_context("fork").Process(target=train_within, args=(60_000, words, said))
    process.start()
    process.join(60)
    assert process.exitcode == 2, said.read_text()
    (line,) = said.read_text().splitlines()
    assert line.startswith("nativerank: error: disk full while writing")
    assert list((out / "checkpoints").iterdir()) == []


def test_a_disk_that_is_full_for_the_records_is_one_line_too(tmp_path, cli, flags, monkeypatch):
    from nativerank.train.metrics import JsonLines

    original = JsonLines.row

    def full(self, row):
        if row["step"] == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, row)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "row", full)
        result = cli("train", *flags(out=out, train__checkpoint_every=3), "--quiet")
    assert (result.code, result.out) == (2, "") and "No space left on device" in result.err
    assert result.err.count("\n") == 1
    assert cli("train", *flags(out=out, train__checkpoint_every=3, resume="auto")).code == 0
    assert [r["step"] for r in read_rows(out) if "loss" in r] == list(range(1, 9))


def test_checkpoints_in_the_background_change_no_bit(tmp_path, run_config, listen, crash, fingerprint, straight):
    common = dict(out=tmp_path / "run", train__checkpoint_every=2, train__checkpoint_async=True)
    with pytest.raises(crash):
        train(run_config(**common), listen(crash_after=7))
    assert [c.step for c in checkpoint.list_checkpoints(tmp_path / "run")] == [4, 6], "the last one came to its end"
    train(run_config(resume="auto", **common), listen())
    assert fingerprint(tmp_path / "run", 8)[:2] == straight


def test_a_full_disk_in_the_background_ends_the_run_soon(tmp_path, cli, flags, monkeypatch):
    calls, original = [], checkpoint.write_pieces

    def fails_at_the_second_save(*args):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args)

    monkeypatch.setattr(checkpoint, "write_pieces", fails_at_the_second_save)
    out = tmp_path / "run"
    words = flags(out=out, train__steps=30, train__checkpoint_every=2, train__checkpoint_async=True)
    result = cli("train", *words, "--quiet")
    assert result.code == 2 and result.err.startswith("nativerank: error: disk full") and result.err.count("\n") == 1
    assert [c.step for c in checkpoint.list_checkpoints(out)] == [2]
    assert max(r["step"] for r in read_rows(out)) <= 6


@pytest.fixture
def on_cuda(monkeypatch):
    """random_state and its inverse as on a CUDA device, whose generator is the list returned."""
    generator, original = [torch.arange(16, dtype=torch.uint8)], checkpoint.random_state

    def set_random_state(model, state):
        torch.set_rng_state(state[generators.RNG])
        generator[0] = state.get(generators.CUDA_RNG, generator[0])

    with_cuda = lambda model: original(model) | {generators.CUDA_RNG: generator[0].clone()}  # noqa: E731
    monkeypatch.setattr(checkpoint, "random_state", with_cuda)
    monkeypatch.setattr(checkpoint, "set_random_state", set_random_state)
    return generator


def small():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    return model, build_optimizer(model, "dense-adamw", lr=0.1)


def load(saved):
    model, optimizer = small()
    return checkpoint.load(saved.path, model, checkpoint.contents(model, optimizer))


def test_the_cuda_generator_is_kept(tmp_path, on_cuda):
    saved = checkpoint.save(tmp_path, 1, checkpoint.contents(*small()), STATE)
    on_cuda[0] = torch.zeros(16, dtype=torch.uint8)
    load(saved)
    assert on_cuda[0].tolist() == list(range(16))


def test_a_checkpoint_of_cuda_is_read_on_the_cpu(tmp_path, on_cuda, monkeypatch):
    saved = checkpoint.save(tmp_path, 1, checkpoint.contents(*small()), STATE)
    monkeypatch.undo()
    assert load(saved) == STATE


def test_a_checkpoint_of_the_cpu_is_read_on_cuda(tmp_path, request):
    saved = checkpoint.save(tmp_path, 1, checkpoint.contents(*small()), STATE)
    assert "rng/cuda" not in Stored([saved.path / "optimizer.safetensors"]).shapes
    generator = request.getfixturevalue("on_cuda")
    assert load(saved) == STATE
    assert generator[0].tolist() == list(range(16)), "left alone"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_cuda_generator_is_that_of_the_models_device(tmp_path):
    model, optimizer = small()
    model.cuda()
    saved = checkpoint.save(tmp_path, 1, checkpoint.contents(model, optimizer), STATE)
    wanted = torch.rand(4, device="cuda")
    checkpoint.load(saved.path, model, checkpoint.contents(model, optimizer))
    assert torch.equal(torch.rand(4, device="cuda"), wanted)
