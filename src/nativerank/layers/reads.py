"""Which layers of a model read the very same tensor: found by running it once and comparing what they read.

The forward pass is as small as can be and runs on fake tensors, which have shapes and no numbers; only a model that
looks at numbers on the way is run itself. Layers of two repeated blocks (cross attention on the output of an encoder)
count as readers of two tensors, since each block may be run again by itself in the backward pass.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


class Read(NamedTuple):
    """One call of a layer.

    Attributes:
        name: of the layer.
        x: what it read.
        written: how often x had been written to.
        block: name of the repeated block that the layer is in, "" for none.
        of_block: whether x was given to that block.
    """

    name: str
    x: Tensor
    written: int
    block: str
    of_block: bool


def same_inputs(reads: Sequence[Read]) -> list[tuple[str, ...]]:
    """Names of layers of a block whose every call reads what the others of the tuple read, in the order of calls."""
    readers: dict[tuple[int, int, str], list[str]] = {}
    for read in reads:
        readers.setdefault((id(read.x), read.written, read.block), []).append(read.name)
    sets: dict[str, set[tuple[str, ...]]] = {}
    for group in readers.values():
        for name in group:
            sets.setdefault(name, set()).add(tuple(group))
    alike = {group for groups in sets.values() for group in groups if all(sets[name] == {group} for name in group)}
    return sorted((g for g in alike if len(set(g)) == len(g) > 1), key=lambda group: list(sets).index(group[0]))


def reads_of(model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Read]:
    """Every call of these layers in one forward pass, in order; on fake tensors if the model takes them."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return recorded(without_numbers(model), names, args, kwargs)
    except Exception:  # Whatever it was, it comes again below if it has nothing to do with fake tensors.
        return recorded(model, names, args, kwargs)


def block_of(model: nn.Module, name: str) -> str:
    """The innermost member of a ModuleList that a layer is in, "" for none."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    return ""


def without_numbers(model: nn.Module) -> nn.Module:
    """A copy whose tensors are fake ones on the CPU; inside a FakeTensorMode."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo)


@torch.no_grad()
def recorded(model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Read]:
    """Every call of these modules in one forward pass, in order."""
    reads: list[Read] = []
    given: dict[str, list[Any]] = {}  # to each block in its last call

    def reader(name: str, block: str) -> Callable[..., None]:
        def read(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            reads.append(Read(name, x, version(x), block, any(x is other for other in given.get(block, []))))

        return read

    def taker(block: str) -> Callable[..., None]:
        return lambda module, inputs, named: given.update({block: [*inputs, *named.values()]})

    if not args and not kwargs:
        device = next(model.parameters()).device
        kwargs = {"input_ids": torch.ones(1, 2, dtype=torch.long, device=device), "use_cache": False}
    within = {name: block_of(model, name) for name in names}
    with ExitStack() as stack:
        for block in set(within.values()) - {""}:
            stack.enter_context(model.get_submodule(block).register_forward_pre_hook(taker(block), with_kwargs=True))
        for name, block in within.items():
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(reader(name, block)))
        stack.enter_context(in_evaluation(model))
        model(*args, **kwargs)
    return reads


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout for the block, so that no random numbers are drawn; each module's mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def version(tensor: Tensor) -> int:
    """How often the tensor was written to; code that is compiled was seen not to write to it."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
