"""One training step on tensors without numbers: what it computes, what it moves, what it holds.

The very code that trains is run under PyTorch's FakeTensorMode, where tensors have shapes and no memory, and every
operator is looked at on its way: FLOPs are those of PyTorch's counter (experts by the rows
they get in all: tokens times the experts that each visits), bytes those of the tensors it reads and writes
(views are free), and every storage is followed from birth to death, so what was alive at once is known after every
operator. Any architecture will do, at any size; a block takes about a tenth of a second.

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        check_loss(model, "auto")  # asks the model whether it takes chunks, which is a pass, too
        found = trace_step(model, lambda m: mean_loss(m, inputs, targets))

Left out: what kernels use inside themselves, what an allocator rounds up or leaves between blocks, the framework.
Attention takes PyTorch's CPU flash kernel, which keeps q, k, v, output and log-sum-exp as that of CUDA does.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop, shape_wrapper

from nativerank.layers.shared import bf16_products

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
aten = torch.ops.aten
# What PyTorch's counter knows under other names: attention on a CPU, which runs its scores again in the backward pass
# as that of CUDA does, and products that are added in place.
COUNTED: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
}


def dense_experts_flop(x: torch.Size, matrices: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """x (S, k), matrices (E, k, n), a row for each expert that a token visits: 2 S k n, whichever these are."""
    return 2 * x[0] * x[1] * matrices[2]


def dense_experts_backward_flop(*args: Any, **kwargs: Any) -> int:
    """The gradients of both."""
    return 2 * dense_experts_flop(*args, **kwargs)


# Of transformers, which defines them when it is imported; ours are in PyTorch's registry (`layers.grouped`).
DENSE_EXPERTS = {
    "grouped_mm_fallback": dense_experts_flop,
    "grouped_mm_fallback_backward": dense_experts_backward_flop,
}


@dataclass(frozen=True)
class Op:
    """Equal calls of one operator in one phase; FLOPs and bytes read and written are those of one call."""

    phase: str
    name: str
    flops: float
    bytes: float
    calls: float = 1


@dataclass(frozen=True)
class Trace:
    """What a step did.

    Attributes:
        ops: by phase, operator and cost.
        before: bytes of parameters, buffers, gradients that were there and optimizer state.
        held: bytes beyond `before` that wait for the backward pass when the forward pass has ended.
        course: by phase the operators in order, each with the bytes beyond `before` that were alive after it, new
            gradients included.
    """

    ops: list[Op]
    before: int
    held: int
    course: dict[str, list[tuple[str, int]]]

    @property
    def peak(self) -> dict[str, int]:
        """By phase the most bytes beyond `before` that were alive at once."""
        return {phase: max(alive for _, alive in steps) for phase, steps in self.course.items()}

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at once."""
        return self.before + max(self.peak.values())


class Tracer(TorchDispatchMode):
    """Follows storages and counts operators while it is entered.

    Args:
        there: tensors that are there before.
        solvers: FLOPs of operators that PyTorch's counter leaves out, by overload packet.
    """

    def __init__(self, there: Iterable[Tensor], solvers: Mapping[Any, Any] | None = None) -> None:
        super().__init__()
        defined = torch.ops.transformers
        more = {getattr(defined, name): count for name, count in DENSE_EXPERTS.items() if hasattr(defined, name)}
        counts = {op: shape_wrapper(count) for op, count in {**more, **(solvers or {})}.items()}
        self.counted = {**flop_registry, **COUNTED, **counts}
        self.alive: dict[int, int] = {}
        self.now, self.phase = 0, FORWARD
        self.course: dict[str, list[tuple[str, int]]] = {}
        self.calls: Counter[tuple[str, str, float, float]] = Counter()
        for tensor in there:
            self.born(tensor)
        self.before = self.now

    def begin(self, phase: str) -> None:
        """From now on it is this phase."""
        self.phase = phase
        self.course[phase] = [("", self.now - self.before)]

    def born(self, tensor: Tensor) -> None:
        """Takes up a tensor's storage unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += self.alive[key]
        weakref.finalize(storage, self.dead, key)

    def dead(self, key: int) -> None:
        """Lets go of a storage."""
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            self.born(tensor)
        packet = function._overloadpacket
        self.course[self.phase].append((packet.__name__, self.now - self.before))
        if not function.is_view:
            touched = sum(t.nbytes for t in (*tree_leaves((args, kwargs)), *made) if isinstance(t, Tensor))
            flops = self.counted[packet](*args, **kwargs, out_val=out) if packet in self.counted else 0
            self.calls[self.phase, packet.__name__, float(flops), float(touched)] += 1
        return out

    @property
    def ops(self) -> list[Op]:
        """What was counted so far."""
        return [Op(*key, calls) for key, calls in self.calls.items()]


def trace_step(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    autocast_bf16: bool = False,
) -> Trace:
    """One forward and backward pass, and one step of the optimizer if there is one; within a FakeTensorMode.

    Args:
        model: of fake tensors on the CPU. Gradients that it has are added to, else they are new.
        loss: of the model, to be differentiated.
        optimizer: of the model, with its state.
        autocast_bf16: products in bfloat16, as on CUDA.
    """
    tracer = Tracer(tensors_of(model, optimizer))
    with tracer:
        tracer.begin(FORWARD)
        with bf16_products("cpu") if autocast_bf16 else nullcontext():
            value = loss(model)
        held = tracer.now - tracer.before
        tracer.begin(BACKWARD)
        value.backward()
        del value
        if optimizer is not None:
            tracer.begin(OPTIMIZER)
            optimizer.step()
    return Trace(tracer.ops, tracer.before, held, tracer.course)


def trace_update(model: nn.Module, optimizer: torch.optim.Optimizer) -> Trace:
    """One step of the optimizer on gradients that are there; within a FakeTensorMode. Its `held` is 0."""
    tracer = Tracer(tensors_of(model, optimizer))
    with tracer:
        tracer.begin(OPTIMIZER)
        optimizer.step()
    return Trace(tracer.ops, tracer.before, 0, tracer.course)


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Parameters, buffers, gradients that are there and optimizer state."""
    state = [t for kept in optimizer.state.values() for t in kept.values()] if optimizer else []
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.parameters(), *model.buffers(), *grads, *(t for t in state if isinstance(t, Tensor))]
