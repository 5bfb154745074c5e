"""Updates inside the backward pass, so that gradients live one after the other instead of all at once.

    ordinary     loss.backward(): every gradient                                 step(): every update
    layer-wise   loss.backward(): gradient, update, free, gradient, update ...   step(): what is left

What is updated at once is the optimizer's own unit of work: one parameter of AdamW, one stack of matrices of the other
rules. A stack holds one layer's factors where these are large; of small ones it holds several layers', whose gradients
wait for each other (`stacks.STACK_BYTES` bounds that). Units and stacks are those of the ordinary step, so its bits are
too.

A weight may change before the backward pass is over, because autograd accumulates its gradient once per pass, when
every use of it (tied weights, modules called twice, recomputed blocks) has handed in its share, and whoever hands in a
share has read the weight for the last time. Code that reads a weight without asking for its gradient would find it
changed; autograd reports that, except inside recomputed blocks.

Nobody sees all gradients before the first update. Hence no clipping, one backward pass per step, and a gradient that
is not finite ends the updates of its step where it turns up: earlier ones stay.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nativerank.linalg.host import anywhere
from nativerank.optim.parallel import run_all


@dataclass
class UpdateUnit:
    """Parameters that are updated at once by calling `update`, and how many such calls run side by side."""

    parameters: list[Tensor]
    update: Callable[[], Any]
    cores: int = 1
    missing: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.missing = {id(p) for p in self.parameters}


class Owner(Protocol):
    """The optimizer, as far as it is needed here."""

    param_groups: list[dict[str, Any]]

    def units(self) -> Iterator[UpdateUnit]: ...


class Layerwise:
    """Hooks onto the parameters of an optimizer, whose `step()` calls `finish` and then `arm`.

    Attributes:
        norms: Euclidean norm of each gradient of this step, by the parameter's id, if they are measured.
        refused: whether a gradient that was not finite ended the updates of this step.
        moved: parameters that were updated in this step.
    """

    def __init__(self, optimizer: Owner):
        self.optimizer = optimizer
        self._clear()
        self.arm()

    def _clear(self) -> None:
        self.hooks: dict[int, tuple[Any, Any]] = {}  # by the parameter's id: it (weakly), and its hook's handle
        self.measure = self.refuse = False
        self.mark: Callable[[str], None] = lambda phase: None
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer = state["optimizer"]  # which arms this when it is complete itself
        self._clear()

    def arm(self) -> None:
        """Hooks onto every parameter that the optimizer holds, and off those that it held."""
        held = {id(p): p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        for key, (parameter, handle) in list(self.hooks.items()):
            if parameter() is not held.get(key):
                handle.remove()
                del self.hooks[key]
        own = weakref.ref(self)  # hooks live as long as the parameters, and must not keep the optimizer alive

        def arrived(parameter: Tensor) -> None:
            layerwise = own()
            if layerwise is not None:
                layerwise._arrived(parameter)

        for key, parameter in held.items():
            if key not in self.hooks:
                self.hooks[key] = weakref.ref(parameter), parameter.register_post_accumulate_grad_hook(arrived)

    def watch(self, measure: bool, refuse: bool, mark: Callable[[str], None]) -> None:
        """What to look at in the steps to come.

        Args:
            measure: keep the norm of every gradient.
            refuse: leave out a unit whose gradients are not finite, and all after it; asks the device at every unit.
            mark: told "backward" before and "optimizer" after each update, to time them.
        """
        self.measure, self.refuse, self.mark = measure, refuse, mark

    def reset(self) -> None:
        """Forgets a step that was begun; the next gradient begins another one."""
        self.units: list[UpdateUnit] | None = None
        self.unit_of: dict[int, UpdateUnit] = {}
        self.waiting: list[UpdateUnit] = []
        self.norms: dict[int, Tensor] = {}
        self.refused, self.moved = False, 0

    def grad_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm of all gradients of this step, as torch.nn.utils.clip_grad_norm_ adds them up."""
        norms = [self.norms[id(p)] for p in parameters if id(p) in self.norms]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)

    @torch.no_grad()
    def finish(self) -> None:
        """Updates what has gradients and was not updated yet: units that lack some, unless this step was refused."""
        left = [unit for unit in self._begun() if unit.missing]
        self._run(self.waiting)
        if not self.refused:
            self._run(left)
        for unit in left:
            self._free(unit)
        moved, refused = self.moved, self.refused
        self.reset()
        self.moved, self.refused = moved, refused

    def _begun(self) -> list[UpdateUnit]:
        if self.units is None:
            self.reset()
            self.units = list(self.optimizer.units())
            self.unit_of = {id(p): unit for unit in self.units for p in unit.parameters}
        return self.units

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        self._begun()
        unit, key = self.unit_of[id(parameter)], id(parameter)
        if key not in unit.missing:
            raise ValueError(
                "optim.layerwise takes one backward pass per step: call step() before the next one, or accumulate "
                "gradients without it"
            )
        if self.measure or self.refuse:
            assert parameter.grad is not None
            self.norms[key] = torch.linalg.vector_norm(parameter.grad)
        unit.missing.remove(key)
        if not unit.missing:
            self._complete(unit)

    def _complete(self, unit: UpdateUnit) -> None:
        self.mark("backward")
        if self.refuse and not self.refused:
            norms = torch.stack([self.norms[id(p)] for p in unit.parameters])
            self.refused = anywhere(~torch.isfinite(norms))
        if self.refused:
            self._free(unit)
        else:
            self.waiting.append(unit)
            if len(self.waiting) >= unit.cores:
                self._run(self.waiting)
        self.mark("optimizer")

    def _run(self, units: list[UpdateUnit]) -> None:
        """Updates these and frees their gradients; a unit meant for one of several cores never gets them all."""
        for cores in sorted({unit.cores for unit in units}):
            run_all([unit.update for unit in units if unit.cores == cores], cores)
        for unit in units:
            self.moved += sum(p.grad is not None for p in unit.parameters)
            self._free(unit)
        units.clear()

    @staticmethod
    def _free(unit: UpdateUnit) -> None:
        for p in unit.parameters:
            p.grad = None
