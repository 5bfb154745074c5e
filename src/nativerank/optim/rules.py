"""The table of update rules: pure functions from (weights, gradients, state) to a change of the weights.

    adamw    m, v <- moments of G;  D = m / (sqrt(v) + eps), bias-corrected.  lr: largest change of an entry, roughly.
    muon, spectron, adamw-capped, adam-muon                        a dense W, and W = A B^T       `optim.products`
    sct, tsvd, stiefel-spectron, frame-spectron           W = U diag(s) V^T, W = A V^T   `optim.frames`

All but adamw see stacks of equal-shaped matrices and work through r x r problems. A new rule is a function, an entry
in RULES and a test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nativerank.optim.float8 import SCALES, scale_shape
from nativerank.optim.frames import frame_spectron, sct, stiefel_spectron, tsvd
from nativerank.optim.precision import kept_as, state_dtype
from nativerank.optim.products import adam_muon, adamw_capped, muon, spectron

RowRange = tuple[int, int] | None


@dataclass(frozen=True)
class Rule:
    """How the shell drives an update function.

    `update` takes one Stack (kind "matrix"), two (kind "pair": up, down) or three (kind "triple": up, down, s); kind
    "elementwise" is AdamW, which the shell hands to torch whole. `state` names the tensors kept per parameter, but of
    an s, which has AdamW's; `options` what the rule reads besides COMMON.
    """

    kind: str
    state: tuple[str, ...]
    options: frozenset[str]
    update: Callable[..., Any] | None = None

    @property
    def width(self) -> int:
        """Parameters that are updated together."""
        return {"pair": 2, "triple": 3}.get(self.kind, 1)

    def state_of(self, position: int) -> tuple[str, ...]:
        """Names of the state tensors of the parameter at this place of its unit."""
        return MOMENT_STATES if position == 2 else self.state


MOMENT_STATES = ("exp_avg", "exp_avg_sq", "step")
WEIGHT_SHAPED = frozenset({"momentum", "exp_avg", "exp_avg_sq"})  # state that is seen tall where the weight is
SMALL = frozenset({"R"})  # state of r x r size
COMMON = frozenset({"lr", "weight_decay", "state_dtype"})
MOMENTS = frozenset({"betas", "eps"})
ORTHOGONAL = frozenset({"momentum", "nesterov", "shape_scale", "orthogonalizer", "orthogonalizer_steps"})
BOUNDED = ORTHOGONAL | {"norm", "power_iterations", "step", "renormalize", "certified"}
SPECTRUM = MOMENTS | {"s_lr", "retraction"}
MOVED = SPECTRUM | {"preserve", "riemannian"}
RULES: dict[str, Rule] = {
    "adamw": Rule("elementwise", MOMENT_STATES, MOMENTS),
    "muon": Rule("matrix", ("momentum",), ORTHOGONAL, muon),
    "spectron": Rule("pair", ("momentum", "power_vector"), BOUNDED, spectron),
    "adamw-capped": Rule("pair", MOMENT_STATES, MOMENTS | {"update_cap"}, adamw_capped),
    "adam-muon": Rule("pair", MOMENT_STATES, (ORTHOGONAL - {"momentum"}) | MOMENTS | {"update_cap"}, adam_muon),
    "sct": Rule("triple", MOMENT_STATES, MOVED | {"retract_every"}, sct),
    "tsvd": Rule("triple", (*MOMENT_STATES, "R"), SPECTRUM, tsvd),
    "stiefel-spectron": Rule(
        "triple", ("momentum",), MOVED | ORTHOGONAL | {"step", "renormalize", "certified"}, stiefel_spectron
    ),
    "frame-spectron": Rule("pair", ("momentum", "power_vector"), BOUNDED | {"retraction"}, frame_spectron),
}


def why_host_waits(rule: str, options: Mapping[str, Any]) -> str | None:
    """What a step reads from its device, in words, or None: frames ask whether any needs more care, and LAPACK's
    eigenvalues, behind exact and certified norms, whether they were found."""
    if RULES[rule].kind == "triple" or rule == "frame-spectron":
        return "it looks whether its frames are orthonormal"
    if options["norm"] == "exact":
        return "norm exact asks whether eigenvalues were found"
    if options["certified"]:
        return "certified asks whether eigenvalues were found"
    if options["update_cap"] is not None:
        return f"update_cap {options['update_cap']} measures the step by eigenvalues"
    return None


def step_device(parameter: Tensor) -> torch.device:
    """Where AdamW's step count lives: on the GPU for torch's fused CUDA kernel, on the host for all others."""
    return parameter.device if parameter.device.type == "cuda" else torch.device("cpu")


def elementwise_states(parameter: Tensor, kept: str) -> tuple[str, ...]:
    """Names of the state tensors of a parameter that AdamW updates element by element."""
    return (*MOMENT_STATES, *SCALES) if kept_as(parameter, kept) == "fp8" else MOMENT_STATES


def initial_state(
    name: str, held: Tensor, shape_tall: int, seed: int, kept: str = "fp32", part: RowRange = None
) -> Tensor:
    """One state tensor at step 0: zeros (of the option `state_dtype`), or a random unit vector over the tall side.

    Args:
        name: of the state.
        held: what this process holds of the parameter. part: (start, length) of the tall side, None for all of it.
        shape_tall: of the whole parameter. seed: of the vector.
        kept: option `state_dtype`, as `kept_as` has it for this parameter.
    """
    if name == "step":
        return torch.zeros((), dtype=torch.float32, device=step_device(held))
    if name == "R":
        eye = torch.eye(min(held.shape[-2:]), device=held.device)
        return eye.to(torch.promote_types(held.dtype, torch.float32))
    if name in SCALES:
        return torch.zeros(scale_shape(held), device=held.device)
    if name != "power_vector":
        dtype = state_dtype(held, kept)
        return torch.zeros_like(held, dtype=dtype, memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(*held.shape[:-2], shape_tall, generator=generator)
    u = torch.nn.functional.normalize(u, dim=-1).to(held)
    return u if part is None else u.narrow(-1, *part).clone()
