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
soap      AdamW of A and B in a basis of the r-dimensional space between them that follows the gradients:
              C <- beta2 C + (1 - beta2) G^T G,   Q <- orthonormal basis near the eigenvectors of C     (r, r)
              m <- beta1 m + (1 - beta1) G,       v <- beta2 v + (1 - beta2) (G Q)^2
              D = lr ((m Q) / (sqrt(v) + eps)) Q^T, bias-corrected, then capped as above if `update_cap` is set;
              with `nesterov` (1 - beta1) G + beta1 m in the place of m.
          SOAP (Vyas et al. 2024, arXiv 2409.11321) with the preconditioner of the short side alone, which for thin
          factors is r x r. A -> A T, B -> B T with an orthogonal T changes nothing but the coordinates: AdamW's
          steps depend on that choice, these do not.
"""

from dataclasses import replace

import torch
from torch import Tensor

from nativerank.linalg.gram import at_least_float32, gram
from nativerank.linalg.orthogonalize import orthogonalize
from nativerank.linalg.retract import frame_factor
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
    """(D_A, D_B, record) of AdamW on both factors, scaled by cap_factor (n, ...) <= 1 so that ||dW||_2 <= update_cap.

    The cap follows the schedule as the rate does. A shortened step keeps AdamW's direction.
    """
    return capped(A, B, adamw_direction(A, options), adamw_direction(B, options), options)


def capped(A: Stack, B: Stack, D_A: Tensor, D_B: Tensor, options: Options) -> tuple[Tensor, Tensor, State]:
    """The changes, shortened together so that ||dW||_2 <= update_cap times the schedule; the record says how much."""
    cap = options["update_cap"] * (options["lr"] / options["initial_lr"] if options["initial_lr"] else 0.0)
    rho = certified_rho(D_A, D_B, A.weight, B.weight, cap).clamp_max(1)
    return D_A * rho[..., None, None], D_B * rho[..., None, None], {"cap_factor": rho}


def soap(A: Stack, B: Stack, options: Options) -> tuple[Tensor, Tensor, State]:
    """(D_A, D_B, record); the record holds cap_factor (n, ...) where `update_cap` is set."""
    D_A, D_B = soap_direction(A, options), soap_direction(B, options)
    return (D_A, D_B, {}) if options["update_cap"] is None else capped(A, B, D_A, D_B, options)


def soap_direction(side: Stack, options: Options) -> Tensor:
    """D (n, ..., d, r) times lr; advances covariance, basis and moments in place.

    The basis is turned every `basis_every` steps by one orthogonal iteration, Q <- qf(C Q); the first step has the
    eigenvectors themselves.
    """
    C, Q = side.state["covariance"], side.state["basis"]
    G = side.grad.to(C.dtype)
    C.lerp_(gram(G), 1 - options["betas"][1])
    if options["taken"] == 1:
        Q.copy_(torch.linalg.eigh(C.cpu() if C.device.type == "mps" else C)[1].flip(-1))
    elif options["taken"] % options["basis_every"] == 0:
        Q.copy_(frame_factor(C @ Q, "qr")[0])
    return adamw_direction(replace(side, grad=G), options, Q, options["nesterov"])
