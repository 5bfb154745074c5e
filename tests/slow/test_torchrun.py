"""The same training under the real torchrun, and how it ends where it cannot begin."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from nativerank.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture
def torchrun():
    """torchrun(processes, *words): exit code and everything that was printed."""

    def run(processes, *words):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "-m", "nativerank", "train", *map(str, words)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=400,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def losses(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(("processes", "mode"), [(2, "fsdp"), (4, "hsdp")])
def test_torchrun_trains_as_one_process(torchrun, flags, tmp_path, processes, mode):
    common = {"train__batch_size": 4, "train__steps": 20, "method": "stiefel-spectron"}
    assert main(["train", "--quiet", *flags(**common, out=tmp_path / "one")]) == 0
    code, said = torchrun(processes, *flags(**common, out=tmp_path / "many", parallel__mode=mode))
    assert code == 0, said
    assert said.count("run folder") == 1  # one process speaks
    assert f"{processes} processes: {f'hsdp, {processes // 2} replicas x 2 shards' if mode == 'hsdp' else mode}" in said
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), abs=1e-5, rel=0)
    one, many = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()


def test_bad_input_is_one_line_and_no_process_stays(torchrun, flags, tmp_path):
    code, said = torchrun(3, *flags(out=tmp_path / "run"))
    assert code != 0
    assert said.count("nativerank: error:") == 1
    assert "2 sequences (train.batch_size 2 x train.accumulation 1) cannot be shared evenly by 3 processes" in said
    assert "exitcode  : 2" in said  # as torchrun lists them
