"""What a plan says against what training does: two real steps of the same configuration, in a process of its own.

    python -m nativerank.plan.check < job.json            # that process, as `check` starts it

| figure | on the CPU | on CUDA |
|---|---|---|
| peak | largest resident set during the steps | the most that PyTorch had allocated |
| base | resident set after a step of one block that is gone again: the framework, buffers of libraries | 0 |

No plan can know the base, so it is added to what was planned. glibc keeps freed blocks of up to 32 MB for what comes
next, which spares page faults and leaves holes; PyTorch does the same on CUDA, beyond what it calls allocated. So the
peak is measured where freed blocks are given back at once, and `kept_peak_bytes`, with the seconds, in another process
as a run has it. The tokens are random: neither data nor its pages count. Two steps, since the second one begins with
an optimizer that has stepped and libraries that have their buffers; its time is taken.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nativerank.allocator import GIVE_BACK
from nativerank.config import RunConfig, saves_memory
from nativerank.data.loader import document_positions
from nativerank.data.shards import Dataset
from nativerank.distributed.grid import SINGLE
from nativerank.evaluate.loss import check_loss
from nativerank.hub.load import tokenizer_fingerprint
from nativerank.models import materialize
from nativerank.plan.subject import Subject
from nativerank.schema import from_dict, to_dict
from nativerank.train.closing import forget_peak, peak_memory_bytes
from nativerank.train.compiled import compile_blocks
from nativerank.train.setup import Built, build, new_skeleton, optimizer_for, pick_device, whole_model
from nativerank.train.step import Batch, StepResult, layerwise_step, train_step

MODULE = "nativerank.plan.check"
STEPS = 2
WARM_TOKENS = 8
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes; read by glibc


def check(planned: Subject, plan: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured: `peak_bytes` with the base in both, `beyond_base_bytes`, `tokens_per_second`.

    Args:
        planned: what was planned, for one process on a device that is here.
        plan: `bytes.peak` and `time.tokens_per_second` of it.

    Raises:
        ValueError: a plan for many processes or for a device that this machine lacks, or a process that ended early.
    """
    device = check_here(planned)
    job = {"config": to_dict(planned.config), "vocab_size": planned.vocab_size}
    as_run = in_a_process(job, GIVE_BACK if saves_memory(planned.config) and device.type == "cpu" else {})
    found = as_run if device.type == "cuda" else in_a_process(job, AT_ONCE)
    base, expected, seconds = found["base_bytes"], plan["bytes"]["peak"], as_run["seconds"]
    rows = {
        "peak_bytes": (expected + base, found["peak_bytes"]),
        "beyond_base_bytes": (expected, found["peak_bytes"] - base),
        "tokens_per_second": (plan["time"]["tokens_per_second"], planned.tokens_per_step / seconds),
    }
    compared = {
        name: {"predicted": a, "measured": b, "ratio": a / b if b > 0 else None} for name, (a, b) in rows.items()
    }
    return {"steps": STEPS, "base_bytes": base, **compared, "kept_peak_bytes": as_run["kept_peak_bytes"]}


def check_here(planned: Subject) -> torch.device:
    """The device, if a check can be made here; else a ValueError."""
    if planned.processes.world > 1:
        raise ValueError(f"--check runs one process, and this plan has {planned.processes.world}; plan for one device")
    return pick_device(planned.config.device or "cpu")


def in_a_process(job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """What `measure` finds where nothing else has been done."""
    command, env = [sys.executable, "-m", MODULE], os.environ | environment
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=env)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed, so probably out of memory"])[-1]
        raise ValueError(f"the process that makes two steps ended with {done.returncode}: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes without a model and at the peak of the steps, seconds of the last one."""
    config = from_dict(RunConfig, job["config"])
    device, dataset = pick_device(config.device or "cpu"), data_of(config, job["vocab_size"])
    warm_up(config, dataset, device)
    forget_peak(device)
    base = peak_memory_bytes(device)
    if base is None:
        raise ValueError("this system does not say how much memory a process takes")
    built = build(config, dataset)
    check_loss(built.model, config.train.loss)
    if config.compile:
        compile_blocks(built.model, lambda message: None)
    forget_peak(device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        result = step(config, built, random_batches(config, dataset, generator, device))
    on_cuda, peak = device.type == "cuda", peak_memory_bytes(device)
    return {
        "base_bytes": 0 if on_cuda else base,
        "peak_bytes": peak,
        "kept_peak_bytes": torch.cuda.max_memory_reserved(device) if on_cuda else peak,
        "seconds": sum(result.seconds.values()),
    }


def warm_up(config: RunConfig, dataset: Dataset, device: torch.device) -> None:
    """A step on few tokens of a model of one block (of all, with --init), which leaves nothing but what was loaded."""
    if config.init:
        model = whole_model(config, dataset, True, SINGLE)[0]
    else:
        m, model = config.model, new_skeleton(config, dataset.vocab_size, None, 1)[0]
        assert m.init_scale is not None
        model = materialize(model, 0, m.init_scale, config.rank.init, m.embedding_std).to(device).train()
    config = replace(config, train=replace(config.train, batch_size=1, accumulation=1, context=WARM_TOKENS))
    built = Built(model, optimizer_for(config, model), None, model, [])
    step(config, built, random_batches(config, dataset, torch.Generator(), device))
    del built, model
    gc.collect()


def data_of(config: RunConfig, vocab_size: int) -> Dataset:
    """The folder of a run, or one that is not there, of this vocabulary and made with the tokenizer of --init."""
    if config.data.path is not None:
        return Dataset.open(config.data.path)
    known = tokenizer_fingerprint(Path(config.init)) if config.init else None
    return Dataset(Path("random tokens"), {"vocab_size": vocab_size, "eot_id": 0, "tokenizer_sha256": known or ""})


def random_batches(
    config: RunConfig, dataset: Dataset, generator: torch.Generator, device: torch.device
) -> list[Batch]:
    """The passes of a step."""
    t = config.train
    assert t.batch_size and t.accumulation and t.context
    batches: list[Batch] = []
    for _ in range(t.accumulation):
        ids = torch.randint(dataset.vocab_size, (t.batch_size, t.context + 1), generator=generator)
        inputs, targets, positions = ids[:, :-1], ids[:, 1:], None
        if config.data.document_mask:
            positions = torch.from_numpy(document_positions(inputs.numpy(), dataset.eot_id)).to(device)
        batches.append((inputs.to(device), targets.to(device), positions))
    return batches


def step(config: RunConfig, built: Built, batches: list[Batch]) -> StepResult:
    """One update as the loop makes it, whatever its loss."""
    chunked = config.train.loss != "whole"
    if built.optimizer.layerwise is None:
        return train_step(
            built.forward,
            built.optimizer,
            batches,
            len(batches),
            config.optim.clip,
            teacher=built.teacher,
            chunked=chunked,
        )
    return layerwise_step(
        built.model,
        built.optimizer,
        batches,
        lambda loss: True,
        lambda loss, grad_norm: True,
        refuse=config.guard.action != "off",
        teacher=built.teacher,
        chunked=chunked,
    )


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.read()))))
