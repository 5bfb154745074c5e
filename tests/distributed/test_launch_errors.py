"""What many processes cannot do is said once, by the first of them, before a step is made; all leave with code 2."""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401  here once instead of in every child

from nativerank.cli.main import main
from nativerank.train import loop  # noqa: F401

IMPOSSIBLE = {
    "grid": (
        {"parallel__mode": "hsdp", "parallel__replicas": 2, "parallel__shards": 2},
        r"a grid of 2 replicas x 2 shards has 4 processes, but there are 2; .*",
    ),
    "replicas": ({"parallel__mode": "ddp", "parallel__replicas": 1}, r"a grid of 1 replicas x 1 .* there are 2; .*"),
    "divisor": ({"parallel__shards": 3}, r"parallel.shards 3 does not divide the 2 processes"),
    "mode": ({"parallel__mode": "none"}, r"parallel.mode none is one process, but 2 were started"),
    "fixed": ({"parallel__mode": "fsdp", "parallel__replicas": 2}, r"parallel.replicas is 1 in mode fsdp, got 2"),
    "batch": (
        {"train__batch_size": 3},
        r"a step's 3 sequences \(train.batch_size 3 x train.accumulation 1\) cannot be shared evenly by 2 processes",
    ),
    "layerwise": (
        {"optim__layerwise": "true", "optim__clip": 0},
        r"optim.layerwise is for one process, not for 2; drop --optim.layerwise",
    ),
    "precision": (
        {"parallel__mode": "ddp", "parallel__precision": "bf16"},
        r"parallel.precision bf16 is for fsdp and hsdp; ddp has whole weights",
    ),
    "nccl": ({"device": "cuda"}, r"nccl needs CUDA, .*"),
    "device": ({"device": "mps"}, r"many processes train on cuda or cpu, not on mps"),
    "timeout": ({"parallel__timeout": 0}, r"parallel.timeout must be at least 1, got 0.*"),
    "key": ({"parallel__mood": "ddp"}, r"unknown config key parallel.mood; did you mean parallel.mode\?"),
    "data": ({"data__path": "nowhere"}, r".*nowhere.*"),
}


def command(rank, words):
    """(exit code, standard error) of a process; `words` may differ by rank."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(words[rank] if isinstance(words[0], list) else words)
    return code, error.getvalue()


def refused(found):
    """The only line that the processes printed, which the first of them did, when all of them left with code 2."""
    assert [code for code, _ in found] == [2] * len(found), found
    assert not any(error for _, error in found[1:]), found
    lines = found[0][1].splitlines()
    assert len(lines) == 1 and lines[0].startswith("nativerank: error: "), found
    return lines[0].removeprefix("nativerank: error: ")


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_is_said_once(tmp_path, launched, flags, name):
    changes, line = IMPOSSIBLE[name]
    said = refused(launched(command, 2, ["train", *flags(out=tmp_path / "run", **changes)]))
    assert re.fullmatch(line, said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optim__lr": 0.02}, r"rank 1 has optim.lr 0.02, rank 0 has 0.01; start every process alike"),
        ({"method": "lowrank-adamw"}, r"rank 1 has method lowrank-adamw, rank 0 has spectron; start every .*"),
        ({"train__steps": 9}, r"rank 1 has train.steps 9, rank 0 has 8; start every process alike"),
        ({"optim__lrr": 1}, r"rank 1: unknown config key optim.lrr.*"),
        ({"rank__energy": 2.0}, r"rank 1: rank.energy .*"),
        ({"data__path": "nowhere"}, r"rank 1 has data.path nowhere, .*"),
    ],
)
def test_processes_that_disagree_are_named(tmp_path, launched, flags, changes, line):
    common = {"out": tmp_path / "run", "optim__lr": 0.01, "method": "spectron"}
    words = [["train", *flags(**common)], ["train", *flags(**common | changes)]]
    said = refused(launched(command, 2, words))
    assert re.fullmatch(line, said), said


def test_other_data_under_the_same_name_are_noticed(tmp_path, launched, flags, prepared, other_prepared):
    """As where a folder is local to each machine."""
    words = ["train", *flags(out=tmp_path / "run", data__path=tmp_path / "data")]
    (tmp_path / "data").symlink_to(prepared)

    said = refused(launched(elsewhere, 2, words, tmp_path / "data", other_prepared))
    assert "rank 1" in said and "data" in said


def elsewhere(rank, words, name, folder):
    """`command`, where the second process sees another folder under the name."""
    if rank == 1:
        from nativerank.data.shards import Dataset

        original = Dataset.open
        Dataset.open = lambda path, *args: original(folder if str(path) == str(name) else path, *args)
    return command(rank, words)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, launched, flags, write_hf_config):
    assert command(0, ["train", *flags(out=tmp_path / "one", train__steps=2)])[0] == 0
    other = write_hf_config(hidden_size=64)
    checkpoint = tmp_path / "one/checkpoints/step-000002"
    words = ["train", *flags(out=tmp_path / "two", model__config=other, resume=checkpoint)]
    said = refused(launched(command, 2, words))
    assert str(checkpoint) in said and re.search(r"shape|fit|lacks|model", said), said
    said = refused(launched(command, 2, ["train", *flags(out=tmp_path / "one", model__config=other, resume="auto")]))
    assert "holds another run, which differs in model.config" in said
    said = refused(launched(command, 2, ["train", *flags(out=tmp_path / "one")]))
    assert "already holds a run" in said


def test_a_damaged_checkpoint_is_refused(tmp_path, launched, flags):
    words = ["train", *flags(out=tmp_path / "run", train__steps=2)]
    assert [code for code, _ in launched(command, 2, words)] == [0, 0]
    weights = next(file for file in (tmp_path / "run/checkpoints/step-000002").iterdir() if file.suffix != ".json")
    weights.write_bytes(weights.read_bytes()[:-1])
    said = refused(launched(command, 2, [*words, "--resume", "auto"]))
    assert weights.name in said and "damaged" in said


# -- without torchrun or a fork of it ------------------------------------------------------------------------------


@pytest.fixture
def ranks(tmp_path):
    """ranks(words of each process): processes started by hand, ended when the test is over."""
    started = []

    def start(*words):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank, own in enumerate(words):
            environment = os.environ | common | {"RANK": str(rank), "WORLD_SIZE": str(len(words))}
            command = [sys.executable, "-m", "nativerank", "train", *own]
            with open(tmp_path / f"log-{rank}", "w") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_processes_started_by_hand_leave_together(tmp_path, ranks, flags):
    words = flags(out=tmp_path / "run", train__batch_size=3)
    codes = [process.wait(120) for process in ranks(words, words)]
    assert refused([(code, (tmp_path / f"log-{rank}").read_text()) for rank, code in enumerate(codes)])


@pytest.mark.slow
def test_who_is_killed_is_named_by_the_others_in_one_line(tmp_path, ranks, flags):
    words = flags(out=tmp_path / "run", train__steps=100_000, train__checkpoint_every=0, parallel__timeout=20)
    processes = ranks(words, words)
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("grad_norm") < 3:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait(60) == 4
    (line,) = (tmp_path / "log-0").read_text().splitlines()
    assert re.fullmatch(r"nativerank: error: rank 1 has left in step \d+ \(host .*, pid \d+\): killed, .*", line), line
