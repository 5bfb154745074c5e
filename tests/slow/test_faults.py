"""What happens to a run under the real torchrun when processes die, hang or are told to stop."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # torch takes seconds to import, in every process
STEPS = 60
SMALL = {"train__steps": STEPS, "train__checkpoint_every": 5, "train__eval_every": 0, "train__probe_every": 0}


def rows(run):
    """The records so far; the last line may be half written."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def events(run):
    return [(row["event"], row["step"]) for row in rows(run) if "event" in row]


def result(run):
    return (run / "model/model.safetensors").read_bytes(), [row["loss"] for row in rows(run) if "loss" in row]


def wait_until(true, what, processes=()):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen"
        assert all(process.poll() is None for process in processes), f"ended before: {what}"
        time.sleep(0.02)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def job(tmp_path, flags):
    """job(name, *launcher, **changes): (torchrun, its run folder); two processes; killed if it is there at the end."""
    started = []

    def start(name, *launcher, **changes):
        changes = SMALL | {"out": tmp_path / name} | changes
        launcher = ["--nproc-per-node", "2", *(launcher or ["--standalone"])]
        words = [*launcher, "-m", "nativerank", "train", *flags(**changes)]
        log = tmp_path / f"{name}-{len(started)}.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        with open(log, "w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        process.log = log
        started.append(process)
        return process, changes["out"]

    yield start
    for process in started:
        family = children(process.pid) if process.poll() is None else []
        for pid in [process.pid, *family] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def undisturbed(job, known):
    """undisturbed(**changes): (weights, losses) of the same job, left alone."""

    def get(**changes):
        key = str(changes)
        if key not in known:
            process, run = job("undisturbed", **changes)
            assert process.wait(PATIENCE) == 0, process.log.read_text()
            known[key] = result(run)
        return known[key]

    return get


def at_step(step, process, run):
    wait_until(lambda: len([row for row in rows(run) if "loss" in row]) >= step, f"step {step}", [process])


@pytest.mark.parametrize("changes", [{}, {"parallel__mode": "fsdp", "train__checkpoint_async": "true"}])
def test_a_worker_that_is_killed_costs_nothing_but_the_steps_since(job, undisturbed, changes):
    process, run = job("killed", "--standalone", "--max-restarts", "1", **changes)
    at_step(STEPS // 3, process, run)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    assert process.wait(PATIENCE) == 0, process.log.read_text()
    (start, (resume, step), end) = events(run)
    assert (start, resume, end) == (("start", 0), "resume", ("end", STEPS)) and step % 5 == 0 < step
    assert "nativerank: error: rank 1 has left in step" in process.log.read_text()
    assert result(run) == undisturbed(**changes)


def test_a_worker_that_is_stopped_is_named_and_the_job_goes_on(job, undisturbed):
    process, run = job("stopped", "--standalone", "--max-restarts", "1", parallel__timeout=4)
    at_step(STEPS // 3, process, run)
    hangs = children(process.pid)[1]
    os.kill(hangs, signal.SIGSTOP)
    wait_until(lambda: "nativerank: error:" in process.log.read_text(), "an error line", [process])
    line = next(line for line in process.log.read_text().splitlines() if "nativerank: error:" in line)
    assert re.search(rf"no sign of life for \d+ s: rank 1 \(host .*, pid {hangs}\)", line), line
    os.kill(hangs, signal.SIGKILL)  # torchrun would give it half a minute
    assert process.wait(PATIENCE) == 0, process.log.read_text()
    assert [event for event, _ in events(run)] == ["start", "resume", "end"]
    assert result(run) == undisturbed()


def test_torchrun_that_is_terminated_has_saved_and_goes_on(job, undisturbed):
    process, run = job("terminated", train__checkpoint_every=0)
    at_step(STEPS // 3, process, run)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) != 0
    _, (event, step) = events(run)
    assert event == "interrupted" and [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert f"stopped after step {step}, saved" in process.log.read_text()
    process, _ = job("terminated", train__checkpoint_every=0, resume="auto")
    assert process.wait(PATIENCE) == 0, process.log.read_text()
    assert ("resume", step) in events(run) and result(run) == undisturbed()


def test_nodes_join_and_leave(job, tmp_path):
    """One process, then two agents with one each, then one again: the steps go on through all of it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    elastic = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "job"]
    elastic += ["--rdzv-conf", "last_call_timeout=2", "--max-restarts", "2", "--nproc-per-node", "1"]
    changes = {"train__steps": 100_000, "train__checkpoint_every": 200, "resume": "auto", "out": tmp_path / "elastic"}
    one, run = job("one", *elastic, **changes)
    at_step(5, one, run)
    assert events(run) == [("start", 0)]
    two, _ = job("two", *elastic, **changes)
    wait_until(lambda: len(events(run)) == 3, "a second node", [one, two])
    (left, before), (came, after) = events(run)[1:]
    assert (left, came) == ("interrupted", "resume") and before == after
    wait_until(lambda: rows(run)[-1]["step"] > after + 5, "steps of two", [one, two])
    for pid in [two.pid, *children(two.pid)]:  # the host is gone
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: [event for event, _ in events(run)][3:] == ["resume"], "a node less", [one])
    resumed = events(run)[3][1]
    assert resumed >= after and resumed % 200 in (0, after % 200)
    wait_until(lambda: rows(run)[-1]["step"] > resumed + 5, "steps of one", [one])
    steps = [row["step"] for row in rows(run) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    one.send_signal(signal.SIGTERM)
    one.wait(PATIENCE)
    assert events(run)[-1][0] == "interrupted"


def test_a_slurm_job_saves_and_is_queued_again(tmp_path, flags):
    """The batch script with the real torchrun, on a Slurm of shell scripts."""
    tools, run = tmp_path / "bin", tmp_path / "run"
    tools.mkdir()
    scripts = {
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" > {tmp_path}/scontrol; fi',
        # As the step daemon does: the signal goes to torchrun and, a moment before it passes it on, to the workers.
        "scancel": f"kill -TERM $(pgrep -P $(cat {tmp_path}/pid)) $(cat {tmp_path}/pid)",
        "srun": f'while [ "${{1#-}}" != "$1" ]; do shift; done; echo $$ > {tmp_path}/pid; exec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"}
    slurm |= {"PROCESSES_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "2", "PATH": f"{tools}:{os.environ['PATH']}"}
    words = flags(**SMALL | {"train__steps": 100_000, "train__checkpoint_every": 0, "out": run})
    command = ["bash", ROOT / "launch/slurm.sbatch", *words]
    with open(tmp_path / "log", "w") as log:
        script = subprocess.Popen(command, env=os.environ | slurm, stdout=log, stderr=log)
    try:
        at_step(5, script, run)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(PATIENCE) != 0
    finally:
        if script.poll() is None:
            script.kill()
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", slurm["SLURM_JOB_ID"]]
    _, (event, step) = events(run)
    assert event == "interrupted" and (run / f"checkpoints/step-{step:06d}").is_dir()
