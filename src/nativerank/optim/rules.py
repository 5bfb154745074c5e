"""Update rules: pure functions from (weights, gradients, state) to the amount that is subtracted.

All matrix rules see stacks of equal-shaped matrices (n, ..., rows, cols) and work through r x r problems.

adamw     m, v <- moments of G;  D = m / (sqrt(v) + eps), bias-corrected.  lr: largest change of an entry, roughly.
muon      M <- mu M + (1 - mu) G;  D = scale(shape) orth(M).              lr: spectral norm of an update.
          (Jordan et al. 2024; orth brings singular values near 1; scale as in torch.optim.Muon)
spectron  the same M and orth for both factors of W = A B^T, and
              D_A = rho orth(M_A),  D_B = rho orth(M_B),  rho = lr / (sigma_A + sigma_B + 1)
          lr: bound on the spectral norm of W's change (Janson et al. 2026, arXiv 2602.12429, Algorithm 1), since
              ||dW|| <= rho (||A|| + ||B||) + rho^2 <= lr   for ||orth|| <= 1, exact norms and rho <= 1.
          Newton-Schulz reaches 1.2 and one power iteration sees sigma from below, so the published form keeps the
          bound in ordinary training, not in the worst case; `certified` keeps it always (see `certified_rho`).
          Variants: `step: root` (`pair_rho`), `renormalize: false` (rho = lr), `orthogonalizer: none` (D along M).
adamw-capped   AdamW's D_A, D_B, shortened together where ||dW|| might exceed `update_cap` (times the schedule):
          asks whether large updates are what ails naive AdamW on factors (`certified_rho` with eta = the cap).

A new rule is a function here, an entry in RULES and a test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nativerank.linalg.gram import at_least_float32, gram, to_float64
from nativerank.linalg.norms import power_iteration, spectral_norm
from nativerank.linalg.orthogonalize import orthogonalize, orthogonalizing_factor

Options = Mapping[str, Any]
MARGIN = 1 + 2e-5  # on certified norms
NONE = "none"  # for an orthogonalizer: the momentum as it is
State = dict[str, Tensor]


@dataclass
class Stack:
    """Equal-shaped matrices side by side: weight, grad and every state tensor start with the same batch dimensions.

    `shape` is that of the parameter as stored (rows, cols); the tensors of a factor are tall views (..., d, r).
    `weight` is there for pair rules only. Rules write to `state` in place and leave weight and grad alone.
    """

    weight: Tensor | None
    grad: Tensor
    state: State
    shape: tuple[int, int]


class Product(NamedTuple):
    """A change D = M Q (n, ..., d, r) as its factors: on a CPU the shell subtracts it without forming it."""

    M: Tensor
    Q: Tensor


Change = Tensor | Product


def formed(change: Change) -> Tensor:
    """D as one tensor."""
    return change.M @ change.Q if isinstance(change, Product) else change


def shape_scale(kind: str, rows: int, cols: int) -> float:
    """The factor on an orthogonalized update of a (rows, cols) parameter.

    none: 1. original: sqrt(max(1, rows / cols)), Muon's. match_rms_adamw: 0.2 sqrt(max(rows, cols)), which gives
    entries the size of AdamW's (Liu et al. 2025, arXiv 2502.16982).
    """
    if kind == "none":
        return 1.0
    if kind == "original":
        return max(1.0, rows / cols) ** 0.5
    if kind == "match_rms_adamw":
        return 0.2 * max(rows, cols) ** 0.5
    raise ValueError(f"shape_scale must be none, original or match_rms_adamw, got {kind!r}")


def averaged(side: Stack, options: Options) -> Tensor:
    """Updates the momentum in place; returns what is orthogonalized: M, or with Nesterov (1 - mu) G + mu M."""
    M, grad, mu = side.state["momentum"], side.grad.to(side.state["momentum"].dtype), options["momentum"]
    M.lerp_(grad, 1 - mu)
    return grad.lerp(M, mu) if options["nesterov"] else M


def muon(side: Stack, options: Options) -> Tensor:
    """D (n, ..., rows, cols): the orthogonalized momentum times its shape scale, times lr."""
    O = averaged(side, options)
    if options["orthogonalizer"] != NONE:
        O = orthogonalize(O, options["orthogonalizer"], options["orthogonalizer_steps"])
    return options["lr"] * shape_scale(options["shape_scale"], *side.shape) * O


def spectron(A: Stack, B: Stack, options: Options) -> tuple[Change, Change, State]:
    """(D_A, D_B, record) for stacks of pairs A (n, ..., d_out, r), B (n, ..., d_in, r).

    Both factors' r x r iterations run as one batch, and rho is folded into the r x r factor Q of D = M Q. The record
    holds sigma_A, sigma_B and rho (n, ...), left on the device.
    """
    assert A.weight is not None and B.weight is not None
    M_A, M_B = at_least_float32(averaged(A, options)), at_least_float32(averaged(B, options))
    Q_A, Q_B = pair_factors(M_A, M_B, options)
    sigma_A, sigma_B = factor_norm(A.weight, A.state, options), factor_norm(B.weight, B.state, options)
    scale_A, scale_B = (shape_scale(options["shape_scale"], *side.shape) for side in (A, B))
    if options["certified"]:
        O_A, O_B = scale_A * (M_A @ Q_A), scale_B * (M_B @ Q_B)
        rho = certified_rho(O_A, O_B, A.weight, B.weight, options["lr"])
        D_A, D_B = O_A * rho[..., None, None], O_B * rho[..., None, None]
        return D_A, D_B, {"sigma_A": sigma_A, "sigma_B": sigma_B, "rho": rho}
    rho = pair_rho(sigma_A + sigma_B, options)
    D_A = Product(M_A, Q_A * (scale_A * rho)[..., None, None])
    D_B = Product(M_B, Q_B * (scale_B * rho)[..., None, None])
    return D_A, D_B, {"sigma_A": sigma_A, "sigma_B": sigma_B, "rho": rho}


def pair_factors(M_A: Tensor, M_B: Tensor, options: Options) -> Tensor:
    """Q_A, Q_B (2, n, ..., r, r) with O = M Q; the identity where nothing is to be orthogonalized."""
    if options["orthogonalizer"] == NONE:
        r = M_A.shape[-1]
        return torch.eye(r, dtype=M_A.dtype, device=M_A.device).expand(2, *M_A.shape[:-2], r, r)
    G = torch.stack([gram(M_A), gram(M_B)])
    return orthogonalizing_factor(G, options["orthogonalizer"], options["orthogonalizer_steps"])


def pair_rho(norms: Tensor, options: Options) -> Tensor:
    """rho (...) from sigma_A + sigma_B (...), for factors O of norm at most 1.

    paper   lr / (norms + 1): bounds rho norms + rho^2 as long as rho <= 1
    root    the positive root of rho^2 + rho norms = lr: the same bound, met with equality, for any lr
    """
    eta = options["lr"]
    if not options["renormalize"]:
        return torch.full_like(norms, eta)
    if options["step"] == "paper":
        return eta / (norms + 1)
    tiny = torch.finfo(norms.dtype).tiny  # for lr 0 at zero norms
    return 2 * eta / (norms + (norms.square() + 4 * eta).sqrt()).clamp_min(tiny)


def certified_rho(O_A: Tensor, O_B: Tensor, A: Tensor, B: Tensor, eta: float) -> Tensor:
    """The largest rho (...) for which ||dW||_2 <= eta is proven, whatever made O_A and O_B, at any eta.

    Proof. Let c_A >= ||O_A||, c_B >= ||O_B||, a >= ||A||, b >= ||B||.
      1. dW = (A - rho O_A)(B - rho O_B)^T - A B^T = -rho (O_A B^T + A O_B^T) + rho^2 O_A O_B^T.
      2. By the triangle inequality and ||X Y^T|| <= ||X|| ||Y||,
         ||dW|| <= rho (c_A b + c_B a) + rho^2 c_A c_B.
      3. The right side grows with rho >= 0 and equals eta at the positive root of c_A c_B rho^2 + (c_A b + c_B a) rho
         = eta, which is returned. Nothing else was assumed: no bound on rho, no quality of O.

    The four norms are measured, not trusted: largest eigenvalues of float64 Gram matrices, whose rounding error
    (below 1e-9 for d r < 1e6) and that of rho O in float32 (below 1e-5 for r < 1e4) the factor MARGIN covers. Weight
    decay and the rounding of the stored factors after the step are outside the bound.
    """
    c_A, c_B, a, b = (MARGIN * spectral_norm(to_float64(X)) for X in (O_A, O_B, A, B))
    linear, quadratic = c_A * b + c_B * a, c_A * c_B
    root = 2 * eta / (linear + (linear.square() + 4 * quadratic * eta).sqrt()).clamp_min(torch.finfo(linear.dtype).tiny)
    largest = torch.finfo(O_A.dtype).max  # for O so small that rho overflows
    return torch.where(linear + quadratic > 0, root.clamp_max(largest), 0.0).to(O_A)


def adamw_capped(A: Stack, B: Stack, options: Options) -> tuple[Tensor, Tensor, State]:
    """(D_A, D_B, record) of AdamW on both factors, scaled by cap_factor (n, ...) <= 1 so that ||dW||_2 <= update_cap.

    The cap follows the schedule as the rate does. A shortened step keeps AdamW's direction.
    """
    assert A.weight is not None and B.weight is not None
    D_A, D_B = adamw_direction(A, options), adamw_direction(B, options)
    cap = options["update_cap"] * (options["lr"] / options["initial_lr"] if options["initial_lr"] else 0.0)
    rho = certified_rho(D_A, D_B, A.weight, B.weight, cap).clamp_max(1)
    D_A, D_B = D_A * rho[..., None, None], D_B * rho[..., None, None]
    return D_A, D_B, {"cap_factor": rho}


def adamw_direction(side: Stack, options: Options) -> Tensor:
    """AdamW's D (n, ..., d, r) times lr, as torch.optim.AdamW computes it; advances the moments in place."""
    m, v, step = (side.state[name] for name in ("exp_avg", "exp_avg_sq", "step"))
    beta1, beta2 = options["betas"]
    grad = side.grad.to(m.dtype)
    step += 1
    m.lerp_(grad, 1 - beta1)
    v.lerp_(grad.square(), 1 - beta2)
    age = step.to(m.device).reshape(-1, *(1 for _ in m.shape[1:]))
    denominator = (v / (1 - beta2**age)).sqrt() + options["eps"]
    return options["lr"] * (m / (1 - beta1**age)) / denominator


def factor_norm(X: Tensor, state: State, options: Options) -> Tensor:
    """sigma_max (n, ...) of the factors before their update; power iteration advances its state in place."""
    if options["norm"] == "exact":
        return spectral_norm(X)
    sigma, u = power_iteration(X, state["power_vector"], options["power_iterations"])
    state["power_vector"].copy_(u)
    return sigma


@dataclass(frozen=True)
class Rule:
    """How the shell drives an update function.

    `update` takes one Stack (kind "matrix") or two (kind "pair"); kind "elementwise" is AdamW, which the shell hands
    to torch whole. `state` names the tensors kept per parameter, `options` what it reads besides COMMON.
    """

    kind: str
    state: tuple[str, ...]
    options: frozenset[str]
    update: Callable[..., Any] | None = None


COMMON = frozenset({"lr", "weight_decay"})
MOMENTS = frozenset({"betas", "eps"})
ORTHOGONAL = frozenset({"momentum", "nesterov", "shape_scale", "orthogonalizer", "orthogonalizer_steps"})
BOUNDED = ORTHOGONAL | {"norm", "power_iterations", "step", "renormalize", "certified"}
RULES: dict[str, Rule] = {
    "adamw": Rule("elementwise", ("exp_avg", "exp_avg_sq", "step"), MOMENTS),
    "muon": Rule("matrix", ("momentum",), ORTHOGONAL, muon),
    "spectron": Rule("pair", ("momentum", "power_vector"), BOUNDED, spectron),
    "adamw-capped": Rule("pair", ("exp_avg", "exp_avg_sq", "step"), MOMENTS | {"update_cap"}, adamw_capped),
}


def step_device(parameter: Tensor) -> torch.device:
    """Where AdamW's step count lives: on the GPU for torch's fused CUDA kernel, on the host for all others."""
    return parameter.device if parameter.device.type == "cuda" else torch.device("cpu")


def initial_state(name: str, parameter: Tensor, shape_tall: int, seed: int) -> Tensor:
    """One state tensor at step 0: zeros, or a random unit vector over the tall side for power iteration."""
    if name == "step":
        return torch.zeros((), dtype=torch.float32, device=step_device(parameter))
    if name != "power_vector":
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(*parameter.shape[:-2], shape_tall, generator=generator)
    return torch.nn.functional.normalize(u, dim=-1).to(parameter)
