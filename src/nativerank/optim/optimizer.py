"""The one optimizer: every parameter in exactly one group, every group with one update rule.

A group's `rule` names an entry of `rules.RULES`. Matrices of equal shape are updated as one stack: their state is
stored side by side for good and each parameter's state is a view of it, so that state_dict() looks like any other
optimizer's (`optim.stacks`). On a CPU stacks of large matrices are updated at once, one per core. Gradients are never
written and state exists from construction on. No value is read back to the host but where a result must be looked at
(`rules.why_host_waits`, `linalg.host`); the steps of other rules can be part of a CUDA graph (`make_capturable`).

Parameters may be spread over processes (DTensors of FSDP2 or HSDP) or the same on all of them (DDP). What AdamW updates
is updated where it lies. Every matrix, with its partner, has one owner that solves its r x r problems (`optim.units`,
`optim.sharded`); state is where it is used, so no process has all of it: `pieces` says what is here (`optim.layout`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.pieces import Piece, local
from nativerank.linalg.resize import Resized
from nativerank.linalg.scope import scoped
from nativerank.optim.check import DEFAULTS, check_group
from nativerank.optim.directions import step_narrow
from nativerank.optim.float8 import step_in_8_bits
from nativerank.optim.layerwise import Layerwise, UpdateUnit
from nativerank.optim.layout import Layout, grid_of_parameters
from nativerank.optim.parallel import at_once, run_all
from nativerank.optim.precision import kept_as
from nativerank.optim.resize import resized_state
from nativerank.optim.rules import RULES, elementwise_states, initial_state, step_device, why_host_waits
from nativerank.optim.stacks import Bucket, step_bucket

GUIDED_STEP = "guided_step"  # key of a state_dict: updates that the guides have seen


class LowRankOptimizer(torch.optim.Optimizer):
    """Drives groups of all update rules together.

    Args:
        groups: dicts with `params` (named parameters; for a pair rule up, down, up, down ..., for a triple up, down,
            s ...), `rule`, and any option of `check.DEFAULTS`.
        grid: the processes that train these parameters together; None asks the DTensors among them, and is one process
            where there are none.
        algebra: of matrices on several processes: "gram", "owner", or per shape what moves fewer bytes.

    Raises:
        ValueError: an unknown rule or option, a value out of range, a parameter in two groups, or "gram" where it
            cannot be.
    """

    guides: Any = None  # layers.Guides of self-guided training, which fade as the optimizer steps
    layerwise: Layerwise | None = None  # updates inside the backward pass, if wanted
    replaced: Callable[[], None] | None = None  # called when parameters are other objects than before

    def __init__(self, groups: Iterable[dict[str, Any]], grid: Grid | None = None, algebra: str = "auto"):
        groups = list(groups)
        for group in groups:
            check_group(group)
        super().__init__(groups, dict(DEFAULTS))
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
        grid = grid or grid_of_parameters(p for group in self.param_groups for p in group["params"])
        self.layout = Layout(self.param_groups, self.state, grid, algebra, begin=True)

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every parameter that has a gradient; a pair moves only if both factors have one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.layerwise is not None:
            self.layerwise.finish()
        else:
            for group in self.param_groups:
                if RULES[group["rule"]].kind == "elementwise":
                    self._step_adamw(group, group["params"])
            if self.layout.sharded is None:
                self._step_matrices()
            else:
                self.layout.sharded.step(self.layout.rows(), self.param_groups, self._step_matrices)
        if self.guides is not None:
            self.guides.set(self.guides.step + 1)
        if self.layerwise is not None:
            self.layerwise.arm()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients; of a layer-wise step that was not finished, everything."""
        super().zero_grad(set_to_none)
        if self.layerwise is not None:
            self.layerwise.reset()

    def update_layerwise(self) -> None:
        """From now on updates inside the backward pass (`optim.layerwise`)."""
        self.layerwise = Layerwise(self)

    def units(self) -> Iterator[UpdateUnit]:
        """Everything this optimizer updates, in the smallest pieces that give the bits of a whole step."""
        for index, group in enumerate(self.param_groups):
            if RULES[group["rule"]].kind == "elementwise":
                yield from (UpdateUnit([p], partial(self._step_adamw, group, [p])) for p in group["params"])
            else:
                buckets, pieces, cores = self._pieces(index)
                for bucket, piece in zip(buckets, pieces, strict=True):
                    yield UpdateUnit([p for side in bucket.sides for p in side], piece, cores)

    def set_rate(self, multiplier: float) -> None:
        """Sets every group's lr to this share of the peak it was built with."""
        for group in self.param_groups:
            lr = group["initial_lr"] * multiplier
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def make_capturable(self) -> None:
        """Lets a CUDA graph capture `step()`, after a few ordinary steps and with gradients that stay where they are.

        Every group's lr becomes a scalar on its device, so that `set_rate` before a replay is what the replay uses.
        To be called again after `load_state_dict`; in a `state_dict` rates are numbers as ever.

        Raises:
            ValueError: a rule that waits for the device, or steps that are more than kernels: guides, layer-wise
                updates, several processes. Nothing is changed.
        """
        more = {
            "guides": self.guides is not None,
            "layer-wise updates": self.layerwise is not None,
            "several processes": self.layout.sharded is not None,
        }
        for name in (name for name, there in more.items() if there):
            raise ValueError(f"a step with {name} cannot be captured")
        for group in self.param_groups:
            if (reason := why_host_waits(group["rule"], group)) is not None:
                raise ValueError(f"a step of {group['rule']} cannot be captured: {reason}")
        for group in self.param_groups:
            device = next((p.device for p in group["params"]), None)
            group["lr"] = torch.tensor(float(group["lr"]), device=device)

    def records(self) -> dict[str, dict[str, float]]:
        """What the last step recorded per pair (sigma_A, sigma_B, rho; or cap_factor), by the factorized module's name.

        Reads from the device: for logging, not for the hot path. Stacked experts report their largest value. Of several
        processes all call this, and all get everything.
        """
        names = {
            id(p): name
            for g in self.param_groups
            for p, name in zip(g["params"], g.get("param_names", []), strict=False)
        }
        found: dict[str, dict[str, float]] = {}
        for bucket, units in self.layout.stepped():
            values = {
                k: v.flatten(1).amax(-1).tolist() if v.dim() > 1 else v.tolist() for k, v in bucket.record.items()
            }
            for row, i in enumerate(bucket.active):
                name = names.get(id(units[i].members[0]))
                if values and name is not None:
                    module = name.removesuffix(".weight").removesuffix(".up")
                    found[module] = {k: v[row] for k, v in values.items()}
        if self.layout.sharded is None:
            return found
        everyone: list[Any] = [None] * self.layout.grid.world
        dist.all_gather_object(everyone, found, self.layout.grid.everyone)
        return {name: values for part in everyone for name, values in part.items()}

    def pieces(self, names: dict[int, str]) -> list[Piece]:
        """Every state tensor that this process holds, or its part of it, sharing memory.

        Args:
            names: of the parameters, by id.
        """
        return list(self.layout.pieces(names))

    def loaded(self) -> None:
        """Tells that weights or state were written from outside: owners have copies. Every process says so."""
        if self.layout.sharded is not None:
            self.layout.sharded.stale = True

    def release(self, group: str) -> None:
        """Lets go of the parameters of a named group, of their gradients and their state."""
        for found in (g for g in self.param_groups if g.get("name") == group):
            for p in found["params"]:
                self.state.pop(p, None)
                p.grad = None
            found["params"], found["param_names"] = [], []

    def adopt(self, group: str, parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
        """Takes parameters into a named group that was released, with the state they have at step 0."""
        for found in (g for g in self.param_groups if g.get("name") == group):
            found["params"] = [p for _, p in parameters]
            found["param_names"] = [name for name, _ in parameters]
            for p in found["params"]:
                kept, names = kept_as(p, found["state_dtype"]), elementwise_states(p, found["state_dtype"])
                self.state[p] = {k: initial_state(k, local(p.detach()), p.shape[-1], 0, kept) for k in names}

    def resize(self, changes: Iterable[Resized]) -> None:
        """Lets the state follow parameters of this optimizer whose columns became others (`layer.resize`)."""
        for change in changes:
            self.state[change.parameter] = resized_state(self.state[change.parameter], change)
        self.layout.forget_stacks()  # other shapes stand side by side now

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, of one process; under GUIDED_STEP also where the guides are, if there are any.

        Raises:
            ValueError: several processes, each of which has a part: `pieces`.
        """
        if self.layout.sharded is not None:
            raise ValueError(
                "each process has a part of this optimizer's state; save what optimizer.pieces() says is here"
            )
        state = super().state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])  # also where a CUDA graph reads it (`make_capturable`)
        return state if self.guides is None else {**state, GUIDED_STEP: self.guides.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a state_dict, before which guides come or go as they were then."""
        if self.guides is not None and GUIDED_STEP in state_dict:
            self.guides.set(state_dict[GUIDED_STEP])
        kept = {p: {key: value.dtype for key, value in state.items()} for p, state in self.state.items()}
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):  # torch has rounded everything to the parameter's dtype
            for key, value in state_dict["state"].get(i, {}).items():
                device = step_device(p) if key == "step" else p.device
                self.state[p][key] = value.detach().to(device, kept.get(p, {}).get(key, value.dtype), copy=True)
        self.layout.forget_stacks()  # the loaded tensors are not views of our stacks any more
        self.loaded()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "guides": self.guides, "layerwise": self.layerwise}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.relayout()
        if self.layerwise is not None:
            self.layerwise.arm()

    def relayout(self, replaced: Mapping[Tensor, Tensor] | None = None) -> None:
        """Finds units, owners and seats again; state is taken as it is.

        Args:
            replaced: parameters and those in their place. State of these, and of what has another owner now, begins
                anew, for whoever calls this to fill it.
        """
        before = getattr(self, "layout", None)  # a copy made by pickle has none
        grid, algebra = (before.grid, before.algebra) if before else (SINGLE, "auto")
        if replaced is not None:
            for group in self.param_groups:
                group["params"] = [replaced.get(p, p) for p in group["params"]]
            for p in replaced:
                self.state.pop(p, None)
        self.layout = Layout(self.param_groups, self.state, grid, algebra, replaced is not None, before)

    def _step_matrices(self) -> None:
        """The ordinary rules, on the matrices that are updated whole here."""
        for index, group in enumerate(self.param_groups):
            if RULES[group["rule"]].kind != "elementwise":
                _, pieces, cores = self._pieces(index)
                run_all(pieces, cores)

    @scoped("optimizer: AdamW")
    def _step_adamw(self, group: dict[str, Any], params: list[Any]) -> None:
        held = {p: (local(p.detach()), local(p.grad)) for p in params if p.grad is not None}
        for p, (weight, grad) in held.items():
            if self.state[p]["exp_avg"].dtype == torch.uint8:
                step_in_8_bits(weight, grad, self.state[p], group, self.layout.first_row(p))
            elif self.state[p]["exp_avg"].dtype != p.dtype:
                step_narrow(weight, grad, self.state[p], group)
        params = [p for p in held if self.state[p]["exp_avg"].dtype == p.dtype]
        if not params:
            return
        states = [self.state[p] for p in params]
        adamw(
            [held[p][0] for p in params],
            [held[p][1] for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _pieces(self, index: int) -> tuple[list[Bucket], list[Callable[[], None]], int]:
        """The stacks of a group, the call that updates each, and how many of these run side by side."""
        group, buckets = self.param_groups[index], self.layout.buckets(index)
        pieces: list[Callable[[], None]] = [partial(step_bucket, b, RULES[group["rule"]], group) for b in buckets]
        return buckets, pieces, at_once(group["params"]) if len(pieces) > 1 else 1
