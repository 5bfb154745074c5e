"""Update rules of W = U diag(s) V^T with orthonormal U (..., d_out, r) and V (..., d_in, r), and of W = A V^T.

sct                AdamW on U, V and s, then a retraction: U <- Q of U - D_U = Q R with diag(R) > 0
                   (arXiv 2604.00733). R is thrown away, so W jumps by it; options:
    preserve       R_U diag(s) R_V^T = P diag(s') Z^T; U <- Q_U P, V <- Q_V Z, s <- s': the retraction keeps W
    riemannian     gradient, step and first moment are tangent: G - U sym(U^T G); after the retraction the first moment
                   is projected onto the new tangent space
    retract_every  k: the retraction is left out in k - 1 of k steps
tsvd               Our reconstruction from the abstract of arXiv 2605.28573, whose body was not available. The layer
                   holds Q of A = Q R, and the optimizer R: AdamW on A with dA = (dQ - Q S) R^-T (`qr_vjp`), then
                   (A - D) R^-1 = Q' R_x and R' = R_x R, which is A - D = Q' R' again. This is autograd through a QR
                   in the forward pass, with one factorization per factor and step however many micro-batches,
                   recomputations and evaluations there are.
stiefel-spectron   Ours. U and V take orthogonalized momentum steps of size rho = lr / (2 max|s| + 1), then the polar
                   retraction; s by AdamW at s_lr. With s fixed, before the retraction and for ||O|| <= 1 (Newton-Schulz
                   reaches 1.2), ||dW|| <= lr as in Spectron with ||U|| = ||V|| = 1. The retraction adds to it: up to
                   2 / sqrt(3) times to first order for polar, 2 to 3.7 times were seen for qr and cholesky, whose R is
                   not symmetric. `certified`: see `certified_step`.
frame-spectron     stiefel-spectron with frames: one. W = A V^T, V orthonormal, A free: Spectron's step on both, then
                   X = V - rho O_V = Q R, V <- Q, A <- A R^T, so that the product, and with it Spectron's bound
                   rho (||A|| + ||V||) + rho^2 <= lr, ||V|| = 1, is that of the step. What the gauge buys: ||V|| is
                   known, and the factors cannot drift apart.

Frames are as orthonormal as their dtype: to 1e-5 in float32, not in bf16, and between two retractions of
`retract_every` not at all, which is also how such a run may end.
Weight decay: of sct and stiefel-spectron on s alone (a retraction undoes any on U, V), of frame-spectron on A; of tsvd
also on its raw A, that is on R: W stays, the angular steps grow. s decays at s_lr, which follows the schedule.
First moments that change basis go along like gradients: U = X T means G_U = G_X T^-T (docs/math.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import Tensor

from nativerank.linalg.change import update_norm
from nativerank.linalg.gram import at_least_float32
from nativerank.linalg.host import anywhere
from nativerank.linalg.retract import frame_factor, qr_vjp, retract, tangent, triangular_product
from nativerank.linalg.roots import triangular_inverse
from nativerank.linalg.scope import scoped
from nativerank.optim.directions import (
    MARGIN,
    New,
    Options,
    Stack,
    State,
    adamw_direction,
    averaged,
    formed,
    pair_factors,
    pair_rho,
    shape_scale,
)
from nativerank.optim.products import spectron

Factors = tuple[Tensor, Tensor, Tensor]
Triple = tuple[New, New, New, State]
ATTEMPTS = 30  # of a certified step to become short enough; after that it stays where it is
Mark = Callable[[str], None]
_mark: ContextVar[Mark] = ContextVar("mark", default=lambda phase: None)


@contextmanager
def marked(mark: Mark) -> Iterator[None]:
    """Within this, and in this thread, `mark` is told "optimizer" before and "retraction" after each retraction."""
    token = _mark.set(mark)
    try:
        yield
    finally:
        _mark.reset(token)


@scoped("optimizer: retraction")
def back_on_frame(X: Tensor, way: str, start: Tensor) -> Tensor:
    """The retraction of a step from the frame `start`, told to whoever times it."""
    _mark.get()("optimizer")
    Q = retract(X, way, start)
    _mark.get()("retraction")
    return Q


def news(factors: Factors, record: State) -> Triple:
    """The factors as changes, with the record."""
    U, V, s = factors
    return New(U), New(V), New(s), record


def sct(U: Stack, V: Stack, s: Stack, options: Options) -> Triple:
    """(U, V, s, record) after the step."""
    X_U, X_V = (
        side.weight - tangential(side, adamw_direction(projected(side, options), options), options) for side in (U, V)
    )
    s_new = stepped_spectrum(s, options)
    every = options["retract_every"]
    if every > 1 and not anywhere(U.state["step"] % every == 0, ordinary=True):  # on the host but on CUDA
        return news((X_U, X_V, s_new), {})
    return news(retracted(U, V, X_U, X_V, s_new, options), {})


def stiefel_spectron(U: Stack, V: Stack, s: Stack, options: Options) -> Triple:
    """(U, V, s, record) after the step; the record holds rho (n, ...)."""
    M = [at_least_float32(tangential(side, averaged(side, options), options)) for side in (U, V)]
    Q = pair_factors(M[0], M[1], options)
    scales = [shape_scale(options["shape_scale"], *side.shape) for side in (U, V)]
    O_U, O_V = (scale * (m @ q) for scale, m, q in zip(scales, M, Q, strict=True))
    rho = frame_rho(s.weight.abs().amax(-1), options)
    s_new = stepped_spectrum(s, options)
    if options["certified"]:
        new, rho = certified_step((U.weight, V.weight, s.weight), rho, O_U, O_V, s_new, options)
        transport(U, V, new[0], new[1], options)
    else:
        X_U, X_V = (side.weight - rho[..., None, None] * O for side, O in ((U, O_U), (V, O_V)))
        new = retracted(U, V, X_U, X_V, s_new, options)
    return news(new, {"rho": rho})


def certified_step(
    old: Factors, rho: Tensor, O_U: Tensor, O_V: Tensor, s_new: Tensor, options: Options
) -> tuple[Factors, Tensor]:
    """((U, V, s), rho) with ||dW||_2 <= lr, retraction and s included, whatever made rho, O_U, O_V and s_new.

    Proof. The candidate of length t in [0, 1] is retract(U - t rho O_U), retract(V - t rho O_V), s + t (s_new - s), as
    it will be stored, and the old factors themselves at t = 0. Its ||dW||_2 is measured from float64 QR factors of
    [U(t) s(t) - U s, U s] and [V(t), V(t) - V] (`update_norm`; MARGIN covers their rounding), and t is shortened until
    it is at most lr, which t = 0 is. Asks the device for the outcome once per attempt.
    """
    t = torch.ones_like(rho)
    for attempt in range(ATTEMPTS + 1):
        new = candidate(old, t, rho, O_U, O_V, s_new, options)
        norm = MARGIN * update_norm(old[0] * old[2][..., None, :], old[1], new[0] * new[2][..., None, :], new[1]).to(t)
        long = ~(norm <= options["lr"])  # NaN is too long as well
        if not anywhere(long):
            break
        shorter = (0.95 * options["lr"] / norm).nan_to_num(0.0, 0.0, 0.0).clamp_max(0.95)
        t = torch.where(long, 0.0 if attempt == ATTEMPTS - 1 else t * shorter, t)
    return new, t * rho


def candidate(
    old: Factors, t: Tensor, rho: Tensor, O_U: Tensor, O_V: Tensor, s_new: Tensor, options: Options
) -> Factors:
    """The factors after a step shortened to t (...) of its length, in the dtypes of the old ones."""
    U, V, s = old
    step = (t * rho)[..., None, None]
    frames = (back_on_frame(at_least_float32(X) - step * O, options["retraction"], X) for X, O in ((U, O_U), (V, O_V)))
    moved = (t > 0)[..., None]
    U_new, V_new = (torch.where(moved[..., None], Q.to(X.dtype), X) for X, Q in zip((U, V), frames, strict=True))
    return U_new, V_new, torch.where(moved, s.lerp(s_new, t[..., None].to(s)), s)


def tsvd(U: Stack, V: Stack, s: Stack, options: Options) -> Triple:
    """(U, V, s, record) after the step; R (n, ..., r, r) of both sides is advanced in place."""
    return news((refactored(U, options), refactored(V, options), stepped_spectrum(s, options)), {})


@scoped("optimizer: retraction")
def refactored(side: Stack, options: Options) -> Tensor:
    """Q' of A' = Q' R', A' the AdamW step from A = Q R; its gradient dA is the QR derivative of side.grad = dL/dQ."""
    Q, R = at_least_float32(side.weight), side.state["R"]
    inverse = triangular_inverse(R)
    D = adamw_direction(replace(side, grad=qr_vjp(Q, R, side.grad.to(Q), inverse=inverse)), options)
    step = triangular_product(D, inverse)
    Q_new, R_x = frame_factor((1 - options["lr"] * options["weight_decay"]) * Q - step, options["retraction"])
    R.copy_(R_x @ R)
    return Q_new


def frame_spectron(A: Stack, V: Stack, options: Options) -> tuple[New, New, State]:
    """(A, V, record) after the step: Spectron's, and then the gauge in which V is orthonormal."""
    D_A, D_V, record = spectron(A, V, options)
    kept = 1 - options["lr"] * options["weight_decay"]
    A_new = kept * at_least_float32(A.weight) - formed(D_A)
    X = at_least_float32(V.weight) - formed(D_V)
    Q, R = frame_factor(X, options["retraction"])
    in_new_basis(V.state, R.mT)
    M = A.state["momentum"]
    M.copy_(times_inverse(M.to(R), R))
    return New(A_new @ R.mT), New(Q), record


def times_inverse(M: Tensor, R: Tensor) -> Tensor:
    """M R^-1 (n, ..., d, r); M itself where R (n, ..., r, r) is singular or near it, of factors that lost their rank.

    R^-1 = (R^T R)^-1 R^T. Not linalg.solve: with MKL its batched LU of 256 x 256 and larger fails once the number of
    threads was raised.
    """
    L, info = torch.linalg.cholesky_ex(R.mT @ R)
    result = torch.cholesky_solve(M.mT, L).mT @ R.mT
    sizes = [X.square().sum((-2, -1)).sqrt() for X in (M, result)]
    good = (info == 0) & (sizes[1] <= 100 * sizes[0])  # NaN is no good either
    return torch.where(good[..., None, None], result, M)


def frame_rho(sigma: Tensor, options: Options) -> Tensor:
    """rho (...) for sigma = max|s|: two steps of norm rho change W by at most sigma (2 rho + rho^2), s fixed.

    paper   lr / (2 sigma + 1), as in Spectron: within lr for lr <= 2, since then rho sigma <= 1
    root    the positive root of sigma (2 rho + rho^2) = lr, or 1 where sigma is so small that this is longer
    """
    eta = options["lr"]
    if not options["renormalize"] or options["step"] == "paper":
        return pair_rho(2 * sigma, options)
    return (eta / (sigma + (sigma * (sigma + eta)).sqrt()).clamp_min(torch.finfo(sigma.dtype).tiny)).clamp_max(1.0)


def stepped_spectrum(s: Stack, options: Options) -> Tensor:
    """s (n, ..., r) after decay and AdamW at its own rate, which follows the schedule of lr."""
    rate = options["lr"]
    if options["s_lr"] is not None:
        rate = options["s_lr"] * (options["lr"] / options["initial_lr"] if options["initial_lr"] else 0.0)
    return s.weight * (1 - rate * options["weight_decay"]) - adamw_direction(s, {**options, "lr": rate})


def tangential(side: Stack, G: Tensor, options: Options) -> Tensor:
    """G itself, or with `riemannian` its projection onto the tangent space at the frame."""
    return tangent(side.weight, G) if options["riemannian"] else G


def retracted(U: Stack, V: Stack, X_U: Tensor, X_V: Tensor, s: Tensor, options: Options) -> Factors:
    """Frames again from X_U and X_V; first and second moments follow where the basis or the tangent space changes."""
    way = options["retraction"]
    if not options["preserve"]:
        Q_U, Q_V = (back_on_frame(X, way, side.weight) for X, side in ((X_U, U), (X_V, V)))
        transport(U, V, Q_U, Q_V, options)
        return Q_U, Q_V, s
    (Q_U, R_U), (Q_V, R_V) = frame_factor(X_U, way), frame_factor(X_V, way)
    P, s_new, Z = aligned_svd((R_U * s[..., None, :]) @ R_V.mT, s)
    in_new_basis(U.state, R_U.mT @ P)
    in_new_basis(V.state, R_V.mT @ Z)
    U_new, V_new = Q_U @ P, Q_V @ Z
    transport(U, V, U_new, V_new, options)
    return U_new, V_new, s_new


def aligned_svd(core: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, s', Z with core = P diag(s') Z^T, columns in the order of |s| and with the signs for which P and Z are near 1.

    A core near diag(s) changes little then, and moments stay with their columns, but where values of s are equal or
    nearly so, as at a flat start: there P and Z are any rotation of those columns. NaN where the core is not finite.
    """
    finite = core.isfinite().all(-1).all(-1)[..., None]
    P, values, Zh = torch.linalg.svd(core.masked_fill(~finite[..., None], 0.0))
    values = values.masked_fill(~finite, torch.nan)
    place = s.abs().argsort(-1, descending=True).argsort(-1)  # of each column among the descending values
    P, Z = (X.gather(-1, place[..., None, :].expand_as(X)) for X in (P, Zh.mT))
    sign_P, sign_Z = (torch.where(X.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(X) for X in (P, Z))
    return P * sign_P[..., None, :], values.gather(-1, place) * sign_P * sign_Z, Z * sign_Z[..., None, :]


def in_new_basis(state: State, T: Tensor) -> None:
    """Moments of X for those of Y = X T^-T: gradients become G T, and squares of uncorrelated ones v (T * T)."""
    for name in ("momentum", "exp_avg"):
        if name in state:
            state[name].copy_(state[name].to(T) @ T)
    if "exp_avg_sq" in state:
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].to(T) @ T.square())


def transport(U: Stack, V: Stack, U_new: Tensor, V_new: Tensor, options: Options) -> None:
    """With `riemannian`, first moments onto the tangent spaces at the new frames."""
    if options["riemannian"]:
        for side, Q in ((U, U_new), (V, V_new)):
            m = first_moment(side)
            m.copy_(tangent(Q, m.to(Q)))


def first_moment(side: Stack) -> Tensor:
    """The mean of gradients that the side keeps."""
    return side.state["momentum" if "momentum" in side.state else "exp_avg"]


def projected(side: Stack, options: Options) -> Stack:
    """The side with the Riemannian gradient in the place of the Euclidean one, if that is wanted."""
    return replace(side, grad=tangential(side, side.grad, options)) if options["riemannian"] else side
