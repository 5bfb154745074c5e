"""Memory of one form of a model while it writes, in a process of its own.

    python -m nativerank.bench.generate_memory '{"form": "merged", ...}'

Peak memory is the process's (of the GPU, what PyTorch allocated), PyTorch and transformers included; `base_bytes` is
what they take before there is a model. Batches come in ascending order; before each the system's mark is set back where
it can be, and memory that merging has freed is handed back before the first.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nativerank.accounting.memory import weights_bytes
from nativerank.bench.generate_sides import Side, Source, random_prompts, write_once
from nativerank.train.closing import forget_peak, peak_memory_bytes
from nativerank.train.setup import pick_device

MODULE = "nativerank.bench.generate_memory"


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes of the weights, and for each batch of the cache at the end and of the peak."""
    device = pick_device(job["device"])
    forget_peak(device)
    base = peak_memory_bytes(device)
    model = Source(**job["source"]).model(job["form"], job["ratio"]).to(device)
    rows = [at_batch(model, batch, job, device) for batch in job["batches"]]
    return {"base_bytes": base, "weights_bytes": weights_bytes(model), "batches": rows}


def measure_memory(
    source: Source, side: Side, batches: Sequence[int], prompt_tokens: int, new_tokens: int, device: str
) -> dict[str, Any]:
    """What `measure` finds for one form in a process where nothing else has been done.

    Raises:
        ValueError: the process ended without a result, which mostly means that memory ran out.
    """
    job = {
        "source": dataclasses.asdict(source),
        "form": side.form,
        "ratio": side.rank_ratio,
        "batches": list(batches),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "device": device,
    }
    done = subprocess.run([sys.executable, "-m", MODULE, json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed, so probably out of memory"])[-1]
        raise ValueError(f"the process that measures {side.form} ended with {done.returncode}: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def add_memory(one: dict[str, Any], found: dict[str, Any]) -> None:
    """Puts what a fresh process found beside the times."""
    assert found["weights_bytes"] == one["weights_bytes"], "the same model"
    one["base_bytes"] = found["base_bytes"]
    for row, memory in zip(one["batches"], found["batches"], strict=True):
        row |= memory


def at_batch(model: nn.Module, batch: int, job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One generation, of which the cache is kept to be weighed."""
    from transformers import DynamicCache

    hf: Any = model
    cache = DynamicCache(config=hf.config)
    forget_peak(device)
    ids = random_prompts(model, batch, job["prompt_tokens"], device)
    write_once(model, ids, job["new_tokens"], past_key_values=cache)
    return {"cache_bytes": cache_bytes(cache), "peak_bytes": peak_memory_bytes(device)}


def cache_bytes(cache: Any) -> int:
    """Of the keys and values of all layers."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
