"""What a plan says against what training does: two real steps of the same configuration, in a process of its own.

    python -m nativerank.plan.check < config.json            # that process, as `check` starts it

On the CPU the peak is the process's largest resident set during the steps; `base_bytes` is what PyTorch, transformers
and this package take before there is a model, which no plan can know and which is added to what was planned. On CUDA
the peak is what PyTorch allocated, and the base nothing. The tokens are random: neither data nor its pages count. Two
steps, since the second one begins with the first one's gradients and an optimizer that has stepped; its time is taken.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from nativerank.config import RunConfig
from nativerank.data.loader import document_positions
from nativerank.data.shards import Dataset
from nativerank.evaluate.loss import check_loss
from nativerank.plan.subject import Subject
from nativerank.schema import from_dict, to_dict
from nativerank.train.closing import forget_peak, peak_memory_bytes
from nativerank.train.compiled import compile_blocks
from nativerank.train.setup import Built, build, pick_device
from nativerank.train.step import Batch, StepResult, layerwise_step, train_step

MODULE = "nativerank.plan.check"
STEPS = 2


def check(planned: Subject, plan: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured: `bytes` with the process's base in both, `beyond_base_bytes`, `tokens_per_second`.

    Args:
        planned: what was planned, for one process on a device that is here.
        plan: `bytes.peak` and `time.tokens_per_second` of it.

    Raises:
        ValueError: a plan for many processes or for a device that this machine lacks, or a process that ended early.
    """
    if planned.processes.world > 1:
        raise ValueError(f"--check runs one process, and this plan has {planned.processes.world}; plan for one device")
    pick_device(planned.config.device or "cpu")
    found = in_a_process({"config": to_dict(planned.config), "vocab_size": planned.vocab_size})
    base, expected = found["base_bytes"], plan["bytes"]["peak"]
    rows = {
        "peak_bytes": (expected + base, found["peak_bytes"]),
        "beyond_base_bytes": (expected, found["peak_bytes"] - base),
        "tokens_per_second": (plan["time"]["tokens_per_second"], planned.tokens_per_step / found["seconds"]),
    }
    compared = {
        name: {"predicted": said, "measured": seen, "ratio": said / seen if seen > 0 else None}
        for name, (said, seen) in rows.items()
    }
    return {"base_bytes": base, "steps": STEPS, "seconds_per_step": found["seconds"], **compared}


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """What `measure` finds where nothing else has been done."""
    command = [sys.executable, "-m", MODULE]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed, so probably out of memory"])[-1]
        raise ValueError(f"the process that makes two steps ended with {done.returncode}: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes before there is a model and at the peak of the steps, seconds of the last one."""
    config = from_dict(RunConfig, job["config"])
    device = pick_device(config.device or "cpu")
    forget_peak(device)
    base = peak_memory_bytes(device)
    if base is None:
        raise ValueError("this system does not say how much memory a process takes")
    dataset = data_of(config, job["vocab_size"])
    built = build(config, dataset)
    check_loss(built.model, config.train.loss)
    if config.compile:
        compile_blocks(built.model, lambda message: None)
    forget_peak(device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        result = step(config, built, random_batches(config, dataset, generator, device))
    return {
        "base_bytes": 0 if device.type == "cuda" else base,
        "peak_bytes": peak_memory_bytes(device),
        "seconds": sum(result.seconds.values()),
    }


def data_of(config: RunConfig, vocab_size: int) -> Dataset:
    """The folder of a run, or one that is not there and whose tokens would be of this vocabulary."""
    if config.data.path is not None:
        return Dataset.open(config.data.path)
    return Dataset(Path("random tokens"), {"vocab_size": vocab_size, "eot_id": 0, "tokenizer_sha256": ""})


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
