"""torch.compile of the repeated blocks of a model, each as one graph where that holds.

All blocks of a shape share one compilation, which takes tens of seconds once; where ranks differ from block to block,
each shape has its own, and PyTorch's limit of compilations (8) is raised to 8 for each block. What lies between them
(embedding, head, loss) and the optimizer run as ever. A block that does not compile as one graph is compiled in pieces,
with Python in between; that is said once. Nothing has run when a compilation fails, so the call that found out is
simply made again.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from nativerank.distributed.wrap import blocks

Say = Callable[[str], None]
COMPILATIONS = 8  # of each block: with and without gradients, masks, other lengths, a rank that changes


class Compiler:
    """How the blocks of one model are compiled; they change together.

    Args:
        say: told in one line when one graph is not possible.
        number: of blocks.
    """

    def __init__(self, say: Say, number: int):
        self.one_graph, self.say, self.room = True, say, COMPILATIONS * number

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"fullgraph": self.one_graph, "recompile_limit": self.room}
        compiled: Callable[..., Any] = torch.compile(function, **options)
        return compiled

    def give_up(self, error: Exception) -> None:
        """Goes on in pieces, because of an error."""
        self.one_graph = False
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self.say(f"compile: the blocks are no single graph and are compiled in pieces ({reason[:120]})")


class CompiledForward:
    """A block's forward function, compiled; a copy of the block gets its own."""

    def __init__(self, function: Callable[..., Any], compiler: Compiler):
        self.function, self.compiler = function, compiler
        self.one_graph, self.compiled = compiler.one_graph, compiler.compile(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.one_graph and self.compiler.one_graph:
            try:
                return self.compiled(*args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                self.compiler.give_up(error)
        if self.one_graph:
            self.one_graph, self.compiled = False, self.compiler.compile(self.function)
        return self.compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledForward":
        return CompiledForward(copy.deepcopy(self.function, memo), self.compiler)


def compile_blocks(model: nn.Module, say: Say) -> None:
    """Compiles the repeated blocks, hooks apart; of a sharded block what lies between the gathering of its weights and
    letting go of them.
    """
    members = list(blocks(model))
    compiler = Compiler(say, len(members))
    for block in members:
        block.forward = CompiledForward(block.forward, compiler)
