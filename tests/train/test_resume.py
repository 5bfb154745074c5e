"""Resuming gives the bits of a run that was never interrupted."""

import io
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from nativerank.cli.main import main
from nativerank.train.loop import Interrupted, train
from nativerank.train.metrics import JsonLines, read_rows

STEPS = 40
METHODS = ["spectron", "lowrank-muon", "lowrank-adamw", "self-guided", "dense-muon", "dense-adamw"]


def steps_of(run):
    return [row["step"] for row in read_rows(run) if "loss" in row]


def losses_of(run):
    return {
        row["step"]: (row["loss"], row["grad_norm"], row["lr"], row.get("val_loss"))
        for row in read_rows(run)
        if "loss" in row
    }


def environment():
    """Equal thread counts: bits depend on them."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def start(flags):
    command = [sys.executable, "-W", "error", "-m", "nativerank", "train", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def train_quietly(flags):
    """In a forked process, which needs no imports of its own."""
    sys.stdout = sys.stderr = io.StringIO()
    sys.exit(main(["train", *flags]))


def wait_for_step(ended, run, step):
    """Until the row of the step is on disk; `ended` gives the exit code of a process that is no more."""
    for _ in range(20_000):
        assert ended() is None, f"ended with {ended()}"
        file = run / "metrics.jsonl"
        if file.exists() and file.read_text().count('"grad_norm"') >= step:
            return
        time.sleep(0.002)
    raise AssertionError("no such step in 40 s")


def end(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


POCKET = {"train__accumulation": 2, "train__context": 32, "train__steps": STEPS, "train__checkpoint_every": 7}


def test_killed_at_a_random_step_and_resumed(tmp_path, cli, flags, fingerprint):
    step = random.randint(1, STEPS - 8)  # new at every test run; in the folder's name if this fails
    straight, killed = tmp_path / "straight", tmp_path / f"killed-at-{step}"
    common = {**POCKET, "guard__window": 5, "train__eval_every": 10}
    # d_model 64 instead of 32 makes a step long enough to be hit.
    common |= {"model__config": flags_config(tmp_path)}
    process = multiprocessing.get_context("fork").Process(target=train_quietly, args=(flags(**common, out=killed),))
    process.start()
    wait_for_step(lambda: process.exitcode, killed, step)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(steps_of(killed)) < STEPS, "it was too fast to be killed"

    assert cli("train", *flags(**common, out=straight)).code == 0
    assert cli("train", *flags(**common, out=killed, resume="auto")).code == 0
    assert fingerprint(killed, STEPS) == fingerprint(straight, STEPS)
    assert steps_of(killed) == list(range(1, STEPS + 1))
    assert losses_of(killed) == losses_of(straight)
    assert (killed / "model/model.safetensors").read_bytes() == (straight / "model/model.safetensors").read_bytes()
    assert not [p for p in killed.rglob("*partial*")]


def flags_config(folder):
    values = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder / "config.json"


def test_a_terminated_process_finishes_the_step_saves_and_exits_with_143(tmp_path, cli, flags, fingerprint):
    out = tmp_path / "run"
    common = {**POCKET, "train__checkpoint_every": 0, "model__config": flags_config(tmp_path)}
    process = start([*flags(**common, out=out)])
    wait_for_step(process.poll, out, 3)
    process.send_signal(signal.SIGTERM)
    code, printed, err = end(process)
    assert (code, err) == (143, "")
    (folder,) = (out / "checkpoints").iterdir()
    stopped = int(folder.name.removeprefix("step-"))
    assert steps_of(out) == list(range(1, stopped + 1)) and 3 <= stopped < STEPS
    assert f"stopped after step {stopped}" in printed


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_printed_command_goes_on(tmp_path, cli, flags, fingerprint, monkeypatch, name, code):
    out, written = tmp_path / "with space", JsonLines.row  # the command must survive a shell

    def row_then_signal(self, row):
        written(self, row)
        if row["step"] == 3 and "loss" in row:
            signal.raise_signal(getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "row", row_then_signal)
        stopped = cli("train", *flags(out=out))
    assert (stopped.code, stopped.err) == (code, "")
    program, *words = shlex.split(stopped.out.strip().splitlines()[-1])
    assert program == "nativerank" and "stopped after step 3, saved" in stopped.out
    resumed = cli(*words)
    assert resumed.code == 0, resumed.err
    assert "resumed at step 3" in resumed.out
    assert steps_of(out) == list(range(1, 9))
    assert cli("train", *flags(out=tmp_path / "straight")).code == 0
    assert fingerprint(out, 8) == fingerprint(tmp_path / "straight", 8)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *((method, {}) for method in METHODS),
        ("sct", dict(optim__retract_every=3)),
        ("sct", dict(optim__riemannian=True)),
        ("spectron", dict(optim__aux_state_dtype="fp8")),
    ],
)
def test_every_method_resumes_bit_for_bit(tmp_path, run_config, listen, crash, fingerprint, method, changes):
    common = dict(
        method=method,
        train__steps=12,
        train__checkpoint_every=4,
        train__accumulation=2,
        train__probe_every=3,
        **changes,
    )
    train(run_config(out=tmp_path / "straight", **common), listen())
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "crashed", **common), listen(crash_after=7))
    again = listen()
    train(run_config(out=tmp_path / "crashed", resume="auto", **common), again)
    assert again.facts["event"] == "resume" and again.facts["step"] == 4
    assert fingerprint(tmp_path / "crashed", 12) == fingerprint(tmp_path / "straight", 12)
    assert losses_of(tmp_path / "crashed") == losses_of(tmp_path / "straight")


def test_a_crash_before_the_first_checkpoint_starts_over(tmp_path, run_config, listen, crash, fingerprint):
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "a"), listen(crash_after=3))
    train(run_config(out=tmp_path / "a", resume="auto"), listen())
    train(run_config(out=tmp_path / "b"), listen())
    assert fingerprint(tmp_path / "a", 8) == fingerprint(tmp_path / "b", 8)
    assert steps_of(tmp_path / "a") == list(range(1, 9))


def test_a_crash_before_the_configuration_is_written_leaves_a_usable_folder(tmp_path, run_config, listen):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".config.yaml.partial").write_text("method: spec")
    train(run_config(out=tmp_path / "a"), listen())
    assert steps_of(tmp_path / "a") == list(range(1, 9))


def test_guard_state_survives(tmp_path, run_config, listen, crash, fingerprint):
    common = dict(guard__window=3, train__checkpoint_every=5, train__steps=10)
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "a", **common), listen(crash_after=7))
    state = fingerprint(tmp_path / "a", 5)[2]
    assert state["guard"]["seen"] == 5 and state["guard"]["mean"] > 0
    train(run_config(out=tmp_path / "a", resume="auto", **common), listen())
    train(run_config(out=tmp_path / "b", **common), listen())
    assert fingerprint(tmp_path / "a", 10) == fingerprint(tmp_path / "b", 10)


def test_dropout_is_part_of_the_run(tmp_path, run_config, write_hf_config, listen, crash, fingerprint):
    """The random state is seeded, saved and put back; the caller's is left alone."""
    gpt2 = write_hf_config(
        model_type="gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3,
    )  # fmt: skip
    common = dict(model__config=gpt2, train__checkpoint_every=3)
    torch.manual_seed(1)
    train(run_config(out=tmp_path / "a", **common), listen())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "b", **common), listen(crash_after=5))
    assert torch.equal(before, torch.get_rng_state())
    train(run_config(out=tmp_path / "b", resume="auto", **common), listen())
    assert fingerprint(tmp_path / "a", 8) == fingerprint(tmp_path / "b", 8)
    train(run_config(out=tmp_path / "c", train__seed=1, **common), listen())
    assert fingerprint(tmp_path / "a", 8)[0] != fingerprint(tmp_path / "c", 8)[0]


def test_a_finished_run_goes_on_for_more_steps(tmp_path, run_config, listen, fingerprint):
    """With a constant rate, whose value at a step does not depend on how many follow, the bits are those of one run."""
    common = dict(optim__schedule="constant", optim__warmup=0.0, out=tmp_path / "a")
    train(run_config(train__steps=5, **common), listen())
    first = (tmp_path / "a/model/model.safetensors").read_bytes()
    summary = train(run_config(train__steps=9, resume="auto", **common), listen())
    assert summary["step"] == 9 and (tmp_path / "a/model/model.safetensors").read_bytes() != first
    train(run_config(train__steps=9, **common | {"out": tmp_path / "b"}), listen())
    assert fingerprint(tmp_path / "a", 9) == fingerprint(tmp_path / "b", 9)
    assert steps_of(tmp_path / "a") == list(range(1, 10))


def test_a_finished_run_can_be_finished_again_and_not_shortened(tmp_path, run_config, listen, fingerprint):
    one = train(run_config(out=tmp_path / "a"), listen())
    before = fingerprint(tmp_path / "a", 8)
    two = train(run_config(out=tmp_path / "a", resume="auto"), listen())
    assert fingerprint(tmp_path / "a", 8) == before and one["val_loss"] == two["val_loss"]
    (tmp_path / "a/.model.partial-killed").mkdir()
    train(run_config(out=tmp_path / "a", resume="auto"), listen())
    assert not [path for path in (tmp_path / "a").iterdir() if "partial" in path.name]
    with pytest.raises(ValueError, match=r"at step 8, beyond --train\.steps 5"):
        train(run_config(out=tmp_path / "a", resume="auto", train__steps=5), listen())


def test_interrupt_in_this_process_restores_the_handlers(tmp_path, run_config, listen):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    listener = listen(at_step={4: lambda: signal.raise_signal(signal.SIGTERM)})
    with pytest.raises(Interrupted) as stopped:
        train(run_config(out=tmp_path / "a"), listener)
    assert (stopped.value.step, stopped.value.signum) == (4, signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert read_rows(tmp_path / "a")[-1] == {"event": "interrupted", "step": 4}


def test_a_checkpoint_of_another_folder_starts_a_branch(tmp_path, run_config, listen, fingerprint):
    common = dict(train__checkpoint_every=4)
    train(run_config(out=tmp_path / "a", **common), listen())
    middle = tmp_path / "a/checkpoints/step-000004"
    train(run_config(out=tmp_path / "b", resume=middle, **common), listen())
    assert fingerprint(tmp_path / "a", 8) == fingerprint(tmp_path / "b", 8)
    assert steps_of(tmp_path / "b") == [5, 6, 7, 8]
    # In its own folder a branch would leave two histories under one name.
    with pytest.raises(ValueError, match="goes on to step-000008"):
        train(run_config(out=tmp_path / "a", resume=middle, **common), listen())
    assert steps_of(tmp_path / "a") == list(range(1, 9))


def test_another_run_in_the_folder_is_refused(tmp_path, run_config, listen):
    train(run_config(out=tmp_path / "a"), listen())
    for change in ({"method": "lowrank-adamw"}, {"train__seed": 1}, {"optim__lr": 0.01}, {"train__batch_size": 3}):
        with pytest.raises(
            ValueError, match=f"holds another run, which differs in .*{next(iter(change)).replace('__', '.')}"
        ):
            train(run_config(out=tmp_path / "a", resume="auto", **change), listen())


def test_a_run_out_of_memory_goes_on_with_recomputation(tmp_path, run_config, listen, fingerprint):
    train(run_config(out=tmp_path / "plain", train__checkpoint_every=4), listen())
    with pytest.raises(Interrupted):
        listener = listen(at_step={4: lambda: signal.raise_signal(signal.SIGTERM)})
        train(run_config(out=tmp_path / "a", train__checkpoint_every=4), listener)
    train(run_config(out=tmp_path / "a", train__checkpoint_every=4, train__recompute="up", resume="auto"), listen())
    assert fingerprint(tmp_path / "a", 8)[:2] == fingerprint(tmp_path / "plain", 8)[:2]


def test_resume_on_other_data_is_refused(tmp_path, run_config, listen, other_prepared, write_hf_config):
    train(run_config(out=tmp_path / "a"), listen())
    with pytest.raises(ValueError, match="was trained on other data"):
        train(run_config(out=tmp_path / "a", resume="auto", data__path=str(other_prepared), train__steps=9), listen())


def test_a_second_signal_acts_at_once_and_nothing_is_lost(tmp_path, cli, flags, monkeypatch, fingerprint):
    written = JsonLines.row

    def row_then_signals(self, row):
        written(self, row)
        if row["step"] == 5 and "loss" in row:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    common = dict(out=tmp_path / "a", train__checkpoint_every=3)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what runs in background
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "row", row_then_signals)
        stopped = cli("train", *flags(**common))
    signal.signal(signal.SIGINT, ignored)
    assert (stopped.code, stopped.err) == (130, "nativerank: interrupted\n")
    assert [p.name for p in (tmp_path / "a/checkpoints").iterdir()] == ["step-000003"]
    assert cli("train", *flags(**common, resume="auto")).code == 0
    assert steps_of(tmp_path / "a") == list(range(1, 9))


@pytest.mark.parametrize(("at_step", "at_batch", "validated"), [(8, None, 0), (None, 0, 1), (None, 3, 4)])
def test_a_signal_at_the_end_stops_with_all_steps_saved(
    tmp_path, cli, flags, monkeypatch, fingerprint, at_step, at_batch, validated
):
    """At the last step, at the first batch of the validation, and between two of them."""
    from nativerank.evaluate import loss

    written, batches, seen = JsonLines.row, loss.sequential_batches, []

    def row_then_signal(self, row):
        written(self, row)
        if row["step"] == at_step and "loss" in row:
            signal.raise_signal(signal.SIGINT)

    def batches_then_signal(*args):
        for i, batch in enumerate(batches(*args)):
            if i == at_batch:
                signal.raise_signal(signal.SIGINT)
            seen.append(batch)
            yield batch

    common = dict(out=tmp_path / "a", train__eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "row", row_then_signal)
        patch.setattr(loss, "sequential_batches", batches_then_signal)
        stopped = cli("train", *flags(**common))
    assert stopped.code == 130 and len(seen) == validated
    assert "stopped after step 8, saved" in stopped.out and not (tmp_path / "a/model").exists()
    words = shlex.split(stopped.out.strip().splitlines()[-1])[1:]
    saved = fingerprint(tmp_path / "a", 8)
    assert cli(*words).code == 0
    assert fingerprint(tmp_path / "a", 8) == saved and (tmp_path / "a/model").is_dir()
    assert read_rows(tmp_path / "a")[-1]["event"] == "end" and steps_of(tmp_path / "a") == list(range(1, 9))


def test_a_run_that_cannot_validate_at_the_end_has_saved_its_steps(tmp_path, run_config, listen, crash, monkeypatch):
    def fails(*args, **options):
        raise crash

    monkeypatch.setattr("nativerank.train.loop.validation_loss", fails)
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "a", train__eval_every=0), listen())
    assert [p.name for p in (tmp_path / "a/checkpoints").iterdir()] == ["step-000008"]


def test_a_resume_draws_no_weights_and_hashes_its_checkpoint_once(tmp_path, run_config, listen, crash, monkeypatch):
    from nativerank.train import checkpoint, setup

    common = dict(train__checkpoint_every=4, data__document_mask=True)
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "a", **common), listen(crash_after=5))
    hashed, sha256 = [], checkpoint.sha256_file
    monkeypatch.setattr(setup, "materialize", lambda *args: pytest.fail("weights were drawn"))
    monkeypatch.setattr(checkpoint, "sha256_file", lambda file: hashed.append(file) or sha256(file))
    train(run_config(out=tmp_path / "a", resume="auto", **common), listen())
    assert len([file for file in hashed if file.parent.name == "step-000004"]) == 3
    hashed.clear()
    path = tmp_path / "a/checkpoints/step-000008"
    train(run_config(out=tmp_path / "a", resume=path, **common), listen())
    assert len(hashed) == 3
