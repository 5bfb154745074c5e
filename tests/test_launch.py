"""The launch templates: valid where their schema is at hand; all of them start the same program through torchrun."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from nativerank.cli.train import parse

LAUNCH = Path(__file__).parents[1] / "launch"
SBATCH = LAUNCH / "slurm.sbatch"


def template(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def check_command(words):
    """The flags of torchrun and of `nativerank train`, both parsed."""
    launcher = get_args_parser().parse_args(words[words[0] == "torchrun" :])
    assert launcher.module and launcher.training_script == "nativerank"
    command, *flags = launcher.training_script_args
    config, _ = parse([word for word in flags if word])
    assert command == "train" and config.resume == "auto" and config.out
    assert launcher.max_restarts == 3 and launcher.shutdown_timeout == 240
    return launcher, config


@pytest.fixture
def cluster(tmp_path):
    """cluster(*flags, **environment): runs the batch script on a Slurm made of shell scripts; what they were told."""

    def tool(name, body):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f"#!/bin/bash\nprintf '%s\\n' {name} \"$@\" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n{body}\n"
        )
        file.chmod(0o755)

    def go(*flags, torchrun="", **environment):
        tool("scontrol", 'if [ "$1" = show ]; then printf "node-a\\nnode-b\\n"; fi')
        tool("srun", 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"')
        tool("scancel", f"kill -TERM $(cat {tmp_path}/torchrun.pid)")
        tool("torchrun", f"echo $$ > {tmp_path}/torchrun.pid\n{torchrun}")
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2"}
        slurm |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64"} | environment
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        command = ["bash", SBATCH, *map(str, flags)]
        done = subprocess.run(command, env=slurm | {"PATH": path}, capture_output=True, text=True, timeout=30)
        calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        return done, [call.split("\n") for call in calls.strip().split("\n\n") if call]

    return go


def test_the_batch_script_starts_torchrun_on_every_node(cluster):
    done, calls = cluster("--config", "run.yaml", "--out", "/shared/with space")
    assert (done.returncode, done.stderr) == (0, "")
    names = [call[0] for call in calls]
    assert names == ["scontrol", "srun", "torchrun"]
    srun, torchrun = calls[1], calls[2]
    assert srun[1:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=64"] and srun[3:] == torchrun
    words = [word for word in torchrun if word not in ("--config", "run.yaml")]
    launcher, config = check_command(words)
    assert (launcher.nnodes, launcher.nproc_per_node, config.out) == ("2", "8", "/shared/with space")
    assert launcher.rdzv_backend == "c10d" and launcher.rdzv_endpoint == "node-a:24711" and launcher.rdzv_id == "4711"


def test_the_batch_script_wants_a_run_folder(cluster):
    done, calls = cluster("--model.preset", "demo")
    assert done.returncode == 2 and done.stderr.startswith("usage:") and not calls


@pytest.mark.parametrize("name", ["USR1", "TERM"])
@pytest.mark.parametrize(("saved_code", "requeued"), [(143, True), (0, False)])
def test_a_signal_saves_and_requeues_unless_the_run_was_done(cluster, name, saved_code, requeued):
    stop = f'trap "exit {saved_code}" TERM; kill -{name} $PPID; for i in $(seq 100); do sleep 0.05; done'
    done, calls = cluster("--out=x", torchrun=stop)  # srun has become torchrun, so its parent is the batch script
    assert done.returncode == saved_code, done.stderr
    assert ["scancel", "--signal=TERM", "4711"] in calls
    assert (["scontrol", "requeue", "4711"] in calls) is requeued


def test_a_run_that_fails_is_not_requeued(cluster):
    done, calls = cluster("--out=x", torchrun="exit 3")
    assert done.returncode == 3 and not [call for call in calls if "requeue" in call]


def test_the_batch_script_is_sound_shell():
    assert subprocess.run(["bash", "-n", SBATCH], capture_output=True).returncode == 0
    text = SBATCH.read_text()
    head, body = text.split("set -euo pipefail")
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", head, flags=re.M))
    assert directives["ntasks-per-node"] == "1" and directives["signal"].startswith("B:USR1@")
    assert "requeue" in directives and "#SBATCH" not in body  # which Slurm would not read there
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, "--severity=warning", SBATCH], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_train_job_starts_the_same_program():
    job = template("trainjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"]
    words = [word for word in trainer["args"] if word not in ("--config", "/shared/run.yaml")]
    _, config = check_command(["torchrun", *words])
    (pod,) = find(job, "terminationGracePeriodSeconds")
    assert pod["terminationGracePeriodSeconds"] > 240  # torchrun's own patience
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert mount["name"] in {volume["name"] for volume in pod["volumes"]}
    assert config.out.startswith(mount["mountPath"] + "/")


def find(tree, key):
    """Every mapping in a tree that has the key."""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tree] * (isinstance(tree, dict) and key in tree) + [
        found for child in children for found in find(child, key)
    ]


def test_the_train_job_fits_the_published_schema():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    job = template("trainjob.yaml")
    read = models.TrainerV1alpha1TrainJob.from_dict(job).to_dict()
    assert read == job  # an unknown key would be gone


def test_the_sky_task_starts_the_same_program():
    task = template("sky.yaml")
    script = task["run"].replace("\\\n", " ")
    values = {"first": "h", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1"}
    (line,) = [line for line in script.splitlines() if line.startswith("torchrun")]
    for name, value in (task["envs"] | values).items():
        line = line.replace(f"${name}", value)
    assert "$" not in line
    launcher, config = check_command(shlex.split(line))
    assert (launcher.nnodes, launcher.nproc_per_node, launcher.node_rank) == ("2", "8", 1)
    assert any(config.out.startswith(f"{folder}/") for folder in task["volumes"])
    assert not task.get("file_mounts")  # a bucket is no disk that nodes share
    assert subprocess.run(["bash", "-nc", task["run"] + task["setup"]]).returncode == 0


def test_the_sky_task_fits_the_published_schema():
    schemas = pytest.importorskip("sky.utils.schemas", reason="pip install skypilot")
    jsonschema = pytest.importorskip("jsonschema")
    task = template("sky.yaml")
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    comment = (LAUNCH / "sky.yaml").read_text()
    volume = yaml.safe_load("\n".join(re.findall(r"^#   (\w+: .*)$", comment, flags=re.M)))
    jsonschema.validate(volume, schemas.get_volume_schema())
    assert [volume["name"]] == list(task["volumes"].values())
