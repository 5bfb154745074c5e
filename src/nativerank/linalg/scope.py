"""Names for what a step does, which a profile finds again; they cost a look at one flag while nobody profiles.

with part("data"): ...            @scoped("optimizer: norms")            mark("forward"): a phase ends here
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

from torch.autograd import profiler

P = ParamSpec("P")
T = TypeVar("T")

PART, MARK = "part of a step: ", "end of a phase: "


def part(name: str) -> AbstractContextManager[Any]:
    """What happens inside belongs to this part of a step."""
    return profiler.record_function(PART + name) if profiler._is_profiler_enabled else nullcontext()


def scoped(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function whose time belongs to this part of a step."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> T:
            with part(name):
                return function(*args, **kwargs)

        return inside

    return decorate


def mark(phase: str) -> None:
    """What happened since the last mark was this phase."""
    if profiler._is_profiler_enabled:
        with profiler.record_function(MARK + phase):
            pass
