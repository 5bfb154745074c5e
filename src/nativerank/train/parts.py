"""Where the time of a training step goes, by parts of the model, from the events of a profile.

Forward hooks name what modules do, `linalg.scope` what else happens in a step. An event of the backward pass has the
sequence number of the forward operator whose gradient it computes, so it belongs to that one's part; what runs in a
named part inside of it is made again there. A part takes the time of its events without those inside of them (on CUDA
that of the kernels they start), so parts add up to the step. Inside compiled blocks nothing has a name: they are one
part.

GFLOP are the exact counts of `accounting.flops`, forward and backward, without what is made again and with attention
counted full: a part's GFLOP/s say how fast it gets done what has to be done.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.autograd.profiler import record_function

from nativerank.accounting.flops import BACKWARD, dense_flops, factor_flops, flops_per_token
from nativerank.distributed.wrap import blocks
from nativerank.layers import linear_modules
from nativerank.layers.base import FactorLayer
from nativerank.linalg.scope import MARK, PART

DOWN, UP, DENSE, EXPERTS = "factors: down", "factors: up", "dense matrices", "experts"
ATTENTION, NORMS, ELEMENTWISE = "attention", "norms", "activation, residuals"
EMBEDDING, HEAD, COMPILED = "embedding, positions, mask", "head and loss", "blocks, compiled"
GRADIENTS, CLIP, UPDATE, BETWEEN = "gradients", "clip", "optimizer: update", "between steps"
DEFAULTS = {"begin": BETWEEN, "forward": HEAD, "backward": GRADIENTS, "clip": CLIP, "optimizer": UPDATE}  # by phase
WAYS = ("forward", "backward", "again")
EXCHANGE, EXCHANGES = "exchange between processes", ("FSDP::", "c10d::", "gloo:", "nccl:")
EVALUATE, STEP = "autograd::engine::evaluate_function", "ProfilerStep"

Where = tuple[str, str]  # part, way
Times = dict[Where, float]


class Row(NamedTuple):
    """A part of a step: its milliseconds per step, forward, backward and made again; GFLOP, 0 where it has none."""

    part: str
    milliseconds: dict[str, float]
    gflop: float

    @property
    def total(self) -> float:
        return sum(self.milliseconds.values())


def parts_of(model: nn.Module, compiled: bool) -> dict[nn.Module, str]:
    """The parts whose calls begin with a module's; what a module calls may belong to another one.

    Of a factor layer `up` is one and the rest the other, since joint products belong to no half of one layer.
    """
    hf: Any = model
    # All outside of the base model is head and loss, which a hook on the head would keep from running in slices.
    found: dict[nn.Module, str] = {hf.base_model: EMBEDDING}
    inside = {module for block in blocks(model) for module in block.modules()}
    found |= {m: NORMS for m in model.modules() if "norm" in type(m).__name__.lower() and not any(m.children())}
    if compiled:
        return {m: name for m, name in found.items() if m not in inside} | {b: COMPILED for b in blocks(model)}
    for module in inside - set(found):
        kind = type(module).__name__.lower()
        if "attention" in kind or "attn" in kind:
            found[module] = ATTENTION
        elif any(module.children()):
            found[module] = ELEMENTWISE
    for matrix in linear_modules(model).values():
        found |= {owner: EXPERTS if matrix.kind == "experts" else DENSE for owner in matrix.owners}
    layers: list[Any] = [module for module in model.modules() if isinstance(module, FactorLayer)]
    for layer in layers:
        apart = isinstance(layer.up, nn.Module)
        found |= {layer: DOWN, layer.up: UP} if apart else {layer: EXPERTS}
        if apart:
            found.pop(layer.down, None)
    return found


class Names:
    """Hooks that put names around the calls of modules, until `remove`."""

    def __init__(self, parts: dict[nn.Module, str]):
        self.open: list[Any] = []
        self.handles: list[Any] = []
        for module, name in parts.items():
            self.handles.append(module.register_forward_pre_hook(self._enter(PART + name), prepend=True))
            # Also if the call ends early, as that of a block does that is run again.
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.open.append(record_function(name))
            self.open[-1].__enter__()

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.open.pop().__exit__(None, None, None)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def gflop_of(model: nn.Module, context: int, tokens: float, compiled: bool) -> dict[str, float]:
    """The exact GFLOP of the forward and backward pass of `tokens` tokens, by part. Guides count as computed."""
    whole, per = flops_per_token(model, context), (1 + BACKWARD) * tokens / 1e9
    found: dict[str, float] = defaultdict(float, {HEAD: whole.head, ATTENTION: whole.attention})
    layers: list[Any] = [module for module in model.modules() if isinstance(module, FactorLayer)]
    for layer in layers:
        products = [gemm.flops for gemm in layer.gemms()]
        if isinstance(layer.up, nn.Module):
            found[UP] += products[1]
            found[DOWN] += sum(products) - products[1]
        else:
            found[EXPERTS] += sum(products)
    stacks = any(matrix.kind == "experts" for matrix in linear_modules(model).values())
    found[EXPERTS if stacks else DENSE] += dense_flops(model)
    if compiled:
        return {HEAD: whole.head * per, COMPILED: (whole.forward - whole.head) * per}
    assert abs(sum(found.values()) - whole.forward) <= 1e-6 * whole.forward or factor_flops(model, 1.0) == 0
    return {name: flops * per for name, flops in found.items() if flops}


def times(events: Sequence[Any], on_device: bool) -> tuple[Times, float, int]:
    """(milliseconds by part and way, of the wall, number of steps) of all recorded steps together; see `listed`."""
    each, roots = listed(events, on_device)
    found: Times = defaultdict(float)
    for where, milliseconds in each:
        found[where] += milliseconds
    return dict(found), sum(root.cpu_time_total for root in roots) / 1e3, len(roots)


def listed(events: Sequence[Any], on_device: bool) -> tuple[list[tuple[Where, float]], list[Any]]:
    """What every event of the recorded steps took, (where it belongs, milliseconds) in their order, and the steps.

    Args:
        events: `torch.profiler.profile.events()`.
        on_device: count what the kernels take that an operator starts, not the operator; then the wall is longer.
    """
    begun = (event for event in events if event.name.startswith(STEP) and not on_kernel(event))
    roots = [event for event in begun if any(child.name.startswith(MARK) for child in event.cpu_children)]
    of_threads = {root.thread for root in roots}
    by_number = numbered(roots)
    found: list[tuple[Where, float]] = []

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3

    def visit(event: Any, where: Where) -> None:
        name, way = event.name, where[1]
        if name.startswith(PART):
            part = name.removeprefix(PART)
            again = way == "backward" and not part.startswith("optimizer")  # which layer-wise updates run there too
            where = part, "again" if again else "forward" if way == "backward" else way
        elif name.startswith(EXCHANGES):
            where = EXCHANGE, way
        elif name.startswith(EVALUATE):
            where = by_number.get(event.sequence_nr, GRADIENTS), "backward"
        found.append((where, own(event)))
        for child, phase in phased(event.cpu_children):
            visit(child, where if phase != "optimizer" else (UPDATE, "forward"))

    for root in roots:
        gaps = own(root)
        for child, phase in phased(root.cpu_children):
            visit(child, default(phase))
        for phase, share in shares(root).items():
            found.append((default(phase), 0.0 if on_device else gaps * share))
    if on_device:  # the backward pass has a thread of its own
        for event in events:
            top = event.cpu_parent is None and event.thread not in of_threads and not on_kernel(event)
            if top and event.name.startswith(EVALUATE):
                visit(event, (GRADIENTS, "backward"))
    return found, roots


def on_kernel(event: Any) -> bool:
    """Whether an event is no operator but something that ran on a device."""
    return event.device_type.name != "CPU"


def default(phase: str) -> Where:
    """Where what has no name in a phase belongs."""
    return DEFAULTS.get(phase, BETWEEN), "backward" if phase == "backward" else "forward"


def numbered(roots: Iterable[Any]) -> dict[int, str]:
    """{sequence number: part} of the operators of forward passes; the last one to have a number made its gradient."""
    found: dict[int, str] = {}

    def visit(event: Any, name: str) -> None:
        if event.name.startswith(EVALUATE):
            return
        if event.name.startswith(PART):
            name = event.name.removeprefix(PART)
        if event.sequence_nr >= 0:
            found[event.sequence_nr] = name
        for child in event.cpu_children:
            visit(child, name)

    for root in roots:
        for child in root.cpu_children:
            visit(child, HEAD)
    return found


def phased(children: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """(event, the phase that the next mark after it ends); after the last mark it is between steps."""
    waiting: list[Any] = []
    for event in sorted(children, key=lambda event: float(event.time_range.start)):
        if event.name.startswith(MARK):
            yield from ((one, event.name.removeprefix(MARK)) for one in (*waiting, event))
            waiting = []
        else:
            waiting.append(event)
    yield from ((one, "") for one in waiting)


def shares(root: Any) -> dict[str, float]:
    """How the time of a step outside of all operators is spread over its phases."""
    begin, inside = root.time_range.start, 0.0
    found: dict[str, float] = defaultdict(float)
    for event in sorted(root.cpu_children, key=lambda event: float(event.time_range.start)):
        if event.name.startswith(MARK):
            found[event.name.removeprefix(MARK)] += max(event.time_range.start - begin - inside, 0.0)
            begin, inside = event.time_range.end, 0.0
        else:
            inside += event.cpu_time_total
    found[""] += max(root.time_range.end - begin - inside, 0.0)
    total = sum(found.values()) or 1.0
    return {phase: value / total for phase, value in found.items()}


def rows_of(found: Times, steps: int, gflop: dict[str, float], wall: float, on_device: bool) -> list[Row]:
    """The parts of a mean step, the longest first."""
    by_part: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(WAYS, 0.0))
    for (name, way), milliseconds in found.items():
        by_part[name][way] += milliseconds / steps
    if on_device:
        busy = sum(found.values())
        by_part["device waits"]["forward"] = max(wall - busy, 0.0) / steps
    rows = [Row(name, values, gflop.get(name, 0.0)) for name, values in by_part.items()]
    return sorted((row for row in rows if row.total), key=lambda row: -row.total)


def table(rows: Sequence[Row]) -> str:
    """One line per part, the last one for all."""
    head = f"{'part':<28}{'ms':>9}{'%':>7}{'forward':>10}{'backward':>10}{'again':>9}{'GFLOP':>9}{'GFLOP/s':>9}"
    whole = Row("step", {way: sum(r.milliseconds[way] for r in rows) for way in WAYS}, sum(r.gflop for r in rows))
    lines = [head]
    for row in (*rows, whole):
        times = "".join(f"{row.milliseconds[way]:{width}.1f}" for way, width in zip(WAYS, (10, 10, 9), strict=True))
        speed = f"{row.gflop:9.1f}{row.gflop / row.total * 1e3:9.1f}" if row.gflop else ""
        lines.append(f"{row.part:<28}{row.total:9.1f}{row.total / whole.total:7.1%}{times}{speed}")
    return "\n".join(lines) + "\n"
