"""Update rules of a dense W and of W = A B^T: what is subtracted, for stacks (n, ..., rows, cols).

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
adam-muon Ours. Muon on both factors along AdamW's direction instead of the momentum,
              m <- beta1 m + (1 - beta1) G,  v <- beta2 v + (1 - beta2) G^2,  D = scale(shape) orth(m / sqrt(v)),
          shortened as above where ||dW|| might exceed `update_cap`. Dividing by sqrt(v) levels the rows and columns
          that orth sees; the cap is Spectron's bound as a limit instead of a rule, so that in ordinary steps the
          growth of the factors does not slow them down.
"""

from torch import Tensor

from nativerank.linalg.gram import at_least_float32
from nativerank.linalg.orthogonalize import orthogonalize
from nativerank.optim.directions import (
    NONE,
    Difference,
    Options,
    Product,
    Stack,
    State,
    adamw_direction,
    averaged,
    certified_rho,
    factor_norm,
    pair_factors,
    pair_rho,
    shape_scale,
)


def muon(side: Stack, options: Options) -> Tensor:
    """D (n, ..., rows, cols): the orthogonalized momentum times its shape scale, times lr."""
    O = averaged(side, options)
    if options["orthogonalizer"] != NONE:
        O = orthogonalize(O, options["orthogonalizer"], options["orthogonalizer_steps"])
    return options["lr"] * shape_scale(options["shape_scale"], *side.shape) * O


def spectron(A: Stack, B: Stack, options: Options) -> tuple[Difference, Difference, State]:
    """(D_A, D_B, record) for stacks of pairs A (n, ..., d_out, r), B (n, ..., d_in, r).

    Both factors' r x r iterations run as one batch, and rho is folded into the r x r factor Q of D = M Q. The record
    holds sigma_A, sigma_B and rho (n, ...), left on the device.
    """
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


def adamw_capped(A: Stack, B: Stack, options: Options) -> tuple[Tensor, Tensor, State]:
    """(D_A, D_B, record) of AdamW on both factors within `update_cap`."""
    return capped(A, B, adamw_direction(A, options), adamw_direction(B, options), options)


def adam_muon(A: Stack, B: Stack, options: Options) -> tuple[Tensor, Tensor, State]:
    """(D_A, D_B, record) of orthogonalized AdamW directions, within `update_cap` if there is one."""
    M = [adamw_direction(side, {**options, "lr": 1.0}, options["nesterov"]) for side in (A, B)]
    Q = pair_factors(at_least_float32(M[0]), at_least_float32(M[1]), options)
    scales = (options["lr"] * shape_scale(options["shape_scale"], *side.shape) for side in (A, B))
    D_A, D_B = (m @ (scale * q) for m, q, scale in zip(M, Q, scales, strict=True))
    return (D_A, D_B, {}) if options["update_cap"] is None else capped(A, B, D_A, D_B, options)


def capped(A: Stack, B: Stack, D_A: Tensor, D_B: Tensor, options: Options) -> tuple[Tensor, Tensor, State]:
    """The changes and a record, scaled by cap_factor (n, ...) <= 1 so that ||dW||_2 <= update_cap.

    A shortened step keeps its direction.
    """
    rho = certified_rho(D_A, D_B, A.weight, B.weight, scheduled_cap(options)).clamp_max(1)
    return D_A * rho[..., None, None], D_B * rho[..., None, None], {"cap_factor": rho}


def scheduled_cap(options: Options) -> float:
    """The cap, which follows the schedule as the rate does."""
    return options["update_cap"] * (options["lr"] / options["initial_lr"] if options["initial_lr"] else 0.0)
