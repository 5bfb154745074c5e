"""The promises that take minutes: real text beats xz, and kill -9 at any moment costs nothing but the steps since."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STEPS = 60


def start(*flags):
    command = [sys.executable, "-W", "error", "-m", "nativerank", "train", *map(str, flags), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(*flags):
    process = start(*flags)
    error = process.communicate()[1]
    assert process.returncode == 0, error


def weights(run):
    return (run / "model/model.safetensors").read_bytes()


def test_a_quarter_of_the_demo_run_is_ten_percent_below_xz_on_real_english(tmp_path):
    finish("--train.steps", 160, "--train.eval_every", 0, "--out", tmp_path / "demo")
    end = json.loads((tmp_path / "demo/metrics.jsonl").read_text().splitlines()[-1])
    assert end["event"] == "end" and 2.1 < end["xz_bits_per_byte"] < 2.4
    assert end["bits_per_byte"] < 0.9 * end["xz_bits_per_byte"]
    assert len(end["sample"].split()) > 5


@pytest.mark.parametrize("method", ["spectron", "lowrank-muon", "dense-adamw"])
def test_killed_again_and_again_ends_with_the_same_bits(tmp_path, method):
    """The killer does not wait for a good moment: start, middle of a step, middle of a save are all hit over time."""
    flags = ["--model.preset", "pocket", "--method", method, "--train.steps", STEPS, "--train.checkpoint_every", 3]
    flags += ["--train.eval_every", 0, "--train.accumulation", 2, "--train.batch_size", 4]
    finish(*flags, "--out", tmp_path / "straight")
    run, kills = tmp_path / "killed", 0
    while kills < 6 and not (run / "model").exists():
        process = start(*flags, "--out", run, "--resume", "auto")
        deadline = time.monotonic() + random.uniform(3, 14)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    finish(*flags, "--out", run, "--resume", "auto")
    assert kills, "it was too fast to be killed"
    assert weights(run) == weights(tmp_path / "straight")
    steps = [row["step"] for row in rows(run) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


def rows(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
