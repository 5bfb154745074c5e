"""Peak memory of training steps, low rank beside the dense twin under the same policies, each in a fresh process.

    python -m nativerank.bench.memory '{"name": "spectron+blocks", ...}'       # one of these processes

A policy is what both sides do about activations and logits: switches of `bench.contestants`, or "chunked" for none of
them, which is what `nativerank train` does by default. The peak is the process's largest resident set (on a GPU what
PyTorch allocated) over training steps, PyTorch and transformers included; `base_bytes` is what these take before there
is a model. Making the weights is left out. Two steps, since only the second one begins with optimizer state and
gradients' memory around.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from nativerank.allocator import GIVE_BACK
from nativerank.bench.contestants import make, split_name
from nativerank.bench.measure import check_sizes, rounds
from nativerank.bench.record import raced, record
from nativerank.methods import find_method
from nativerank.models import DENSE, Preset, find_preset, scaled
from nativerank.train.closing import forget_peak, peak_memory_bytes
from nativerank.train.setup import pick_device

MODULE = "nativerank.bench.memory"
CHUNKED = "chunked"
POLICIES = ("whole", CHUNKED, "blocks+whole", "blocks")
STEPS = 2


def bench_memory(
    preset_name: str = "spectron-s",
    method: str = "spectron",
    dense_method: str = "dense-adamw",
    policies: Sequence[str] = POLICIES,
    d_model: int | None = None,
    layers: int | None = None,
    context: int = 512,
    batch_size: int = 4,
    repeats: int = 3,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measures peak memory of two training steps, and the seconds of the second one.

    Args:
        preset_name: shapes; d_model, layers: override them. context, batch_size: of the steps.
        method: the low-rank side. dense_method: the other side.
        policies: switches that both sides get, a case each.
        repeats: processes of each side and policy.
        device: cpu, cuda or mps.

    Returns:
        For each policy, medians: `base_bytes`, `peak_bytes` (with `peak_spread`), and the peaks' `peak_ratio` to the
        dense side's; besides the times.

    Raises:
        ValueError: an unknown preset, a width that it cannot have, methods of the wrong kind, a policy that a side does
            not have, or a process that ended early.
    """
    check_sizes(repeats=repeats, d_model=d_model, layers=layers, batch_size=batch_size, context=context)
    if find_method(method).layer is None or find_method(dense_method).layer is not None:
        raise ValueError(f"bench memory compares a low-rank method with a dense one, got {method} and {dense_method}")
    where, sides = pick_device(device), {p: [_named(m, p) for m in (method, dense_method)] for p in policies}
    for name in [name for names in sides.values() for name in names]:
        split_name(name)
    shapes = {"preset": preset_name, "d_model": d_model, "layers": layers, "context": context}
    _preset(shapes)  # before the first process
    settings: dict[str, Any] = {**shapes, "batch_size": batch_size, "steps": STEPS, "repeats": repeats}
    settings |= {"method": method, "dense_method": dense_method, "policies": list(policies), "device": device}
    cases = []
    for policy, names in sides.items():
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for in_order, _ in rounds(names, repeats, warmup=0):
            for name in in_order:
                found[name].append(_in_a_process({"name": name, "batch_size": batch_size, "device": device, **shapes}))
        cases.append(_case(policy, found))
    return record("memory", settings, cases, where)


def _named(method: str, policy: str) -> str:
    return method if policy == CHUNKED else f"{method}+{policy}"


def _case(policy: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the processes of both sides found under one policy; the dense side comes last."""
    method, dense = ({key: [one[key] for one in rows] for key in rows[0]} for rows in found.values())
    both = {name.split("+")[0]: values for name, values in zip(found, (method, dense), strict=True)}
    reference = list(both)[-1]
    peaks = {name: statistics.median(values["peak_bytes"]) for name, values in both.items()}
    return raced(
        {"policy": policy},
        reference,
        {name: values["seconds"] for name, values in both.items()},
        base_bytes={name: statistics.median(values["base_bytes"]) for name, values in both.items()},
        peak_bytes=peaks,
        peak_spread={name: [min(values["peak_bytes"]), max(values["peak_bytes"])] for name, values in both.items()},
        peak_ratio={name: peak / peaks[reference] for name, peak in peaks.items()},
    )


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """What `measure` finds where nothing else has been done."""
    again = {"up", "blocks"} & set(job["name"].split("+"))  # then `nativerank train` gives freed memory back
    env = os.environ | (GIVE_BACK if again and job["device"] == "cpu" else {})
    done = subprocess.run([sys.executable, "-m", MODULE, json.dumps(job)], capture_output=True, text=True, env=env)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed, so probably out of memory"])[-1]
        raise ValueError(f"the process that measures {job['name']} ended with {done.returncode}: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes before there is a model and at the peak of STEPS steps, seconds of the last one."""
    device, preset = pick_device(job["device"]), _preset(job)
    forget_peak(device)
    base = peak_memory_bytes(device)
    contestant = make(job["name"], preset, device, say=lambda message: None)
    forget_peak(device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(preset.vocab_size, (job["batch_size"], preset.context + 1), generator=generator).to(device)
        phases = contestant.step((ids[:, :-1], ids[:, 1:], None))
    return {"base_bytes": base, "peak_bytes": peak_memory_bytes(device), "seconds": sum(phases.values())}


def _preset(job: dict[str, Any]) -> Preset:
    base = find_preset(job["preset"].removesuffix(DENSE))
    return replace(scaled(base, job["d_model"], job["layers"]), context=job["context"])


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
