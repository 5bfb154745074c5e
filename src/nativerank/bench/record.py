"""What every `nativerank bench NAME --json` holds, whatever it measures.

    {"benchmark": NAME, "settings": {flag: value}, "environment": {versions, commit, processor, cores, threads, memory,
     GPU, load}, "cases": [{...figures}], ...what belongs to no case}

A case in which contestants took turns has

    "case": {what differs from its neighbours}    "reference": name
    "seconds": {name: median}                     "spread": {name: [least, most]}
    "ratio": {name: median over rounds of its seconds / the reference's}

so a ratio below 1 is faster than the reference. Ratios of one process are what stands in texts; seconds belong to the
machine that `environment` describes.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nativerank.accounting.hardware import memory_of_machine
from nativerank.bench.measure import medians, ratio
from nativerank.hub.forms import processor
from nativerank.train.setup import versions


def record(
    benchmark: str, settings: Mapping[str, Any], cases: Sequence[dict[str, Any]], device: torch.device, **more: Any
) -> dict[str, Any]:
    """The result of a benchmark.

    Args:
        settings: its flags. cases: what it found. device: where it ran.
        more: what belongs to no case.
    """
    return {
        "benchmark": benchmark,
        "settings": dict(settings),
        "environment": environment(device),
        "cases": list(cases),
        **more,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and hardware; `threads` are PyTorch's own number, which a case may have changed.

    `load_average` counts the tasks that wanted a core in the last 1, 5 and 15 minutes, this benchmark's included.
    """
    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        gpu = {"gpu": about.name, "gpu_memory_bytes": about.total_memory, "cuda": torch.version.cuda}
    return {
        **{key: value for key, value in versions().items() if key != "machine"},
        "device": device.type,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_of_machine(),
        **gpu,
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def raced(
    case: Mapping[str, Any], reference: str, seconds: Mapping[str, list[float]], **figures: Any
) -> dict[str, Any]:
    """A case in which contestants took turns.

    Args:
        case: what was raced on. reference: the contestant that the others are compared with.
        seconds: of all rounds, in order. figures: what else is known.
    """
    return {
        "case": dict(case),
        "reference": reference,
        "seconds": medians(seconds),
        "spread": {name: [min(values), max(values)] for name, values in seconds.items()},
        "ratio": {name: ratio(values, seconds[reference]) for name, values in seconds.items()},
        **figures,
    }
