"""What a process hands to others, counted where PyTorch's collectives pass.

    all-to-all                      what is sent, without the part for itself
    all-reduce                      2 (n - 1) / n of the tensor, as a ring does it
    reduce-scatter                  (n - 1) / n of the input
    all-gather                      n - 1 times the input
    broadcast, object exchanges     the tensor, once

n processes in the group. The same convention as in `accounting.traffic`.
"""

from collections import Counter, defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Sent(TorchDispatchMode):
    """Within this: bytes by the phase that `phase` names, and how many collectives."""

    def __init__(self, phase: str):
        super().__init__()
        self.phase = phase
        self.bytes: dict[str, float] = defaultdict(float)
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and "barrier" not in function.name():
            self.bytes[self.phase] += sent(function.name(), args)
            self.collectives[self.phase] += 1
        return function(*args, **(kwargs or {}))


def sent(name: str, args: Any) -> float:
    """Bytes that one collective takes from this process to others."""
    group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and is_group(a))
    n, rank = group.size(), group.rank()
    if "alltoall_base" in name:
        source, sizes = args[1], args[4]
        row = source.nbytes // max(1, source.shape[0])
        return source.nbytes - (sizes[rank] * row if sizes else source.nbytes // n)
    tensors = args[1] if "gather" in name or "scatter" in name else args[0]
    size = sum(t.nbytes for t in flattened(tensors))
    if "allreduce" in name:
        return 2 * (n - 1) * size / n
    if "reduce_scatter" in name:
        return (n - 1) * size / n
    return (n - 1) * size if "gather" in name else size


def is_group(value: torch.ScriptObject) -> bool:
    """Whether an argument is the process group, and not how to reduce."""
    return "ProcessGroup" in str(value._type())


def flattened(tensors: Any) -> list[torch.Tensor]:
    """The tensors of a tensor, or of lists of them."""
    return [tensors] if isinstance(tensors, torch.Tensor) else [t for part in tensors for t in flattened(part)]
