"""What update rules are made of: stacks of matrices with their state, changes, directions and step sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nativerank.linalg.gram import gram, to_float64
from nativerank.linalg.norms import power_iteration, spectral_norm
from nativerank.linalg.orthogonalize import orthogonalizing_factor
from nativerank.linalg.scope import scoped
from nativerank.optim.precision import keep, keep_squares, widened

Options = Mapping[str, Any]
MARGIN = 1 + 2e-5  # on certified norms
WIDE_AT_ONCE = 1 << 20  # elements of a parameter with narrow state that are widened together
NONE = "none"  # for an orthogonalizer: the momentum as it is
State = dict[str, Tensor]


@dataclass
class Stack:
    """Equal-shaped matrices side by side: weight, grad and every state tensor start with the same batch dimensions.

    `shape` is that of the parameter as stored (rows, cols); the tensors of a factor are tall views (..., d, r), those
    of a spectrum s are (..., r). Rules of kind "matrix" get no `weight`. Rules write to `state` in place and leave
    weight and grad alone.
    """

    grad: Tensor
    state: State
    shape: tuple[int, ...]
    stored: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weights, of rules that see them."""
        assert self.stored is not None
        return self.stored


class Product(NamedTuple):
    """A change D = M Q (n, ..., d, r) as its factors: on a CPU the shell subtracts it without forming it."""

    M: Tensor
    Q: Tensor


class New(NamedTuple):
    """What takes the place of the weights (n, ...), where a step is no subtraction; weight decay is in it already."""

    weight: Tensor


Difference = Tensor | Product
Change = Difference | New


def formed(change: Difference) -> Tensor:
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
    M, mu = widened(side.state["momentum"]), options["momentum"]
    grad = side.grad.to(M.dtype)
    M.lerp_(grad, 1 - mu)
    keep(side.state["momentum"], M)
    return grad.lerp(M, mu) if options["nesterov"] else M


@scoped("optimizer: orthogonalize")
def pair_factors(M_A: Tensor, M_B: Tensor, options: Options) -> Tensor:
    """Q_A, Q_B (2, n, ..., r, r) with O = M Q; the identity where nothing is to be orthogonalized."""
    if options["orthogonalizer"] == NONE:
        r = M_A.shape[-1]
        return torch.eye(r, dtype=M_A.dtype, device=M_A.device).expand(2, *M_A.shape[:-2], r, r)
    return gram_factors(torch.stack([gram(M_A), gram(M_B)]), options)


@scoped("optimizer: orthogonalize")
def gram_factors(G: Tensor, options: Options) -> Tensor:
    """Q (..., r, r) with O = M Q from G = M^T M."""
    return orthogonalizing_factor(G, options["orthogonalizer"], options["orthogonalizer_steps"])


def pair_rho(norms: Tensor, options: Options) -> Tensor:
    """rho (...) from sigma_A + sigma_B (...), for factors O of norm at most 1.

    paper   lr / (norms + 1): bounds rho norms + rho^2 as long as rho <= 1
    root    the positive root of rho^2 + rho norms = lr: the same bound, met with equality, for any lr
    """
    eta = options["lr"]
    if not options["renormalize"]:
        return torch.ones_like(norms) * eta
    if options["step"] == "paper":
        return eta / (norms + 1)
    tiny = torch.finfo(norms.dtype).tiny  # for lr 0 at zero norms
    return 2 * eta / (norms + (norms.square() + 4 * eta).sqrt()).clamp_min(tiny)


@scoped("optimizer: norms")
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
    return rho_within(eta, c_A, c_B, a, b, O_A.dtype).to(O_A.device)


def rho_within(eta: float, c_A: Tensor, c_B: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The positive root rho (...) of c_A c_B rho^2 + (c_A b + c_B a) rho = eta, in the dtype of O; 0 for NaN."""
    linear, quadratic = c_A * b + c_B * a, c_A * c_B
    root = 2 * eta / (linear + (linear.square() + 4 * quadratic * eta).sqrt()).clamp_min(torch.finfo(linear.dtype).tiny)
    largest = torch.finfo(dtype).max  # for O so small that rho overflows
    return torch.where(linear + quadratic > 0, root.clamp_max(largest), 0.0).to(dtype)


def adamw_direction(side: Stack, options: Options, nesterov: bool = False) -> Tensor:
    """AdamW's D (n, ..., d, r) times lr, as torch.optim.AdamW computes it; advances the moments in place.

    With `nesterov` the step is along (1 - beta1) G + beta1 m, what m would be if the gradient came once more.
    """
    step, (beta1, beta2) = side.state["step"], options["betas"]
    m, v = (widened(side.state[name]) for name in ("exp_avg", "exp_avg_sq"))
    grad = side.grad.to(m.dtype)
    step += 1
    D = None if nesterov else in_one_pass(grad, m, v, step, options)
    if D is None:
        m.lerp_(grad, 1 - beta1)
        v.lerp_(grad.square(), 1 - beta2)
    keep(side.state["exp_avg"], m)
    keep_squares(side.state["exp_avg_sq"], v, step)
    if D is not None:
        return D
    mean = grad.lerp(m, beta1) if nesterov else m
    shape = (-1, *(1 for _ in m.shape[1:]))
    # In float64 on the counter's own device: 1 - 0.999**1 keeps four digits in float32, and MPS has no float64.
    ages = step.double() + nesterov, step.double()
    correct1, correct2 = ((1 - b**age).to(m).reshape(shape) for b, age in zip((beta1, beta2), ages, strict=True))
    return mean.mul(options["lr"] / correct1).div_((v / correct2).sqrt_() + options["eps"])


def in_one_pass(grad: Tensor, m: Tensor, v: Tensor, step: Tensor, options: Options) -> Tensor | None:
    """D and new moments by torch's fused kernel, which touches everything once; None where it cannot.

    It subtracts its step from parameters: from zeros, at a negative rate, that is D.
    """
    flipped = m.dim() > 2 and not m.is_contiguous()  # the tall view of matrices that lie flat
    if flipped:
        grad, m, v = grad.mT, m.mT, v.mT
    if m.device.type != "cpu" or not len(m) or not (m.is_contiguous() and v.is_contiguous()):
        return None
    D, (beta1, beta2) = torch.zeros_like(m), options["betas"]
    torch._fused_adamw_(
        D.unbind(),
        grad.contiguous().unbind(),
        m.unbind(),
        v.unbind(),
        [],
        step.unbind(),
        lr=-options["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=options["eps"],
        amsgrad=False,
        maximize=False,
    )
    return D.mT if flipped else D


def step_narrow(parameter: Tensor, gradient: Tensor, state: State, options: Options) -> None:
    """AdamW on a parameter whose moments are kept narrower than itself, a few rows at a time."""
    parameter.mul_(1 - options["lr"] * options["weight_decay"])
    rows = max(1, WIDE_AT_ONCE * len(parameter) // max(1, parameter.numel()))
    tensors = parameter, gradient, state["exp_avg"], state["exp_avg_sq"]
    for weight, grad, m, v in zip(*(x.split(rows) for x in tensors), strict=True):
        moments = {"exp_avg": m[None], "exp_avg_sq": v[None], "step": state["step"][None].clone()}
        weight.sub_(adamw_direction(Stack(grad[None], moments, ()), options)[0])
    state["step"] += 1


@scoped("optimizer: norms")
def factor_norm(X: Tensor, state: State, options: Options) -> Tensor:
    """sigma_max (n, ...) of the factors before their update; power iteration advances its state in place."""
    if options["norm"] == "exact":
        return spectral_norm(X)
    sigma, u = power_iteration(X, state["power_vector"], options["power_iterations"])
    state["power_vector"].copy_(u)
    return sigma
