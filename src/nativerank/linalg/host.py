"""The one place where the algebra reads a value to decide what to do next.

`anywhere` asks whether any matrix of a stack needs more care, mostly once per stack. A GPU makes the host wait for the
answer, so who can do without asks on a CPU only (`asks_for_free`). Rules that promise not to wait (`optim.rules`) never
come here on a GPU. Tensors without values, of a trace or a plan, get the answer that is ordinary.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(X: Tensor) -> bool:
    """Whether there is something to read: not on the meta device, nor in a trace on fake tensors."""
    return not isinstance(X, FakeTensor) and X.device.type != "meta"


def asks_for_free(X: Tensor) -> bool:
    """Whether the host need not wait for an answer about X."""
    return X.device.type == "cpu"


def anywhere(mask: Tensor, ordinary: bool = False) -> bool:
    """Whether an entry of `mask` is true; `ordinary` where it has no values. The host waits for its device."""
    return bool(torch.any(mask)) if has_values(mask) else ordinary
