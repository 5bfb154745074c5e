"""The outer step of DiLoCo for one W: from what every replica made of its factors to the weights all go on from.

    theta_0   the weights all replicas began the round with        theta_i   replica i's after its inner steps
    d = theta_0 - mean_i theta_i,   v <- mu v + d,   theta = theta_0 - lr (d + mu v)           (Douillard et al. 2023,
    arXiv 2311.08105; Nesterov as in torch.optim.SGD; without it theta = theta_0 - lr v; lr 1, mu 0 is plain averaging)

    plain     any tensor, and A, B of W = A B^T       theta as it is
    triple    W = U diag(s) V^T                       theta = (X_U, x_s, X_V); X = Q H, the polar factors;
                                                      H_U diag(x_s) H_V = P diag(s') Z^T;  U' = Q_U P, V' = Q_V Z:
                                                      U' diag(s') V'^T = X_U diag(x_s) X_V^T, nothing is lost
    frame     W = A V^T, V orthonormal                X_V = Q H;  V' = Q, A' = X_A H: again the same product

Other bases. U' = X T^-T with T = H P turns gradients G of X into G T, and so the inner optimizer's averages of them
(`frames.in_new_basis`); v is a displacement, which goes along with X: U' = X H^-1 P, so v' = v H^-1 P. A displacement
of s, which is diagonal in the old basis, keeps its diagonal in the new one.

`cap`: theta is theta_0 + t (X - theta_0), t in [0, 1] shortened until ||dW||_2 <= limit, measured on the factors as
they are stored, retraction included; at t = 0 they are theta_0 to the bit. The outer momentum is not shortened.

Averaging factors is not averaging matrices. With a_i = A_i - mean A and so on the gap is a sum of thin products,

    mean_i (A_i B_i^T) - mean A mean B^T = 1/n sum_i a_i b_i^T,           for triples A_i = U_i diag(s_i) and one term
    more, (1/n sum_i u_i diag(sigma_i)) mean V^T, since mean A is not mean U diag(mean s)

whose norm two QR factorizations of (d, n r) stacks give. All in float64, O((d_out + d_in) (n r)^2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nativerank.linalg.change import product_norm, update_norm
from nativerank.linalg.gram import to_float64
from nativerank.linalg.retract import frame_factor
from nativerank.optim.directions import MARGIN
from nativerank.optim.frames import ATTEMPTS, aligned_svd, times_inverse

PLAIN, PAIR, FRAME, TRIPLE = "plain", "pair", "frame", "triple"
Weights = tuple[Tensor, ...]  # tall: (X,), (A, B), (A, V) or (U, V, s)


class Sgd(NamedTuple):
    """The outer optimizer; `limit` is the largest ||dW||_2 of a factorized matrix, None for any."""

    lr: float
    momentum: float
    nesterov: bool = True
    limit: float | None = None


class OuterStep(NamedTuple):
    """What a unit's owner found.

    weights, velocity: the new ones, in the dtypes of the old. bases: T (..., r, r) of every factor that changed its
    basis (`changed`). gap, change, kept (...): the norms above, and the t that was kept; of factors only.
    """

    weights: Weights
    velocity: Weights
    bases: Weights = ()
    gap: Tensor | None = None
    change: Tensor | None = None
    kept: Tensor | None = None


class Candidate(NamedTuple):
    """Weights with the T of changed factors and what `velocity_in_new_basis` needs."""

    weights: Weights
    bases: Weights = ()
    roots: Weights = ()


def changed(form: str) -> tuple[int, ...]:
    """Which members' gradients are in another basis after the step."""
    return {TRIPLE: (0, 1), FRAME: (0, 1)}.get(form, ())


def agree(form: str, start: Weights, ends: Sequence[Weights], velocity: Weights, sgd: Sgd) -> OuterStep:
    """One outer step of a unit.

    Args:
        form: of the unit.
        start: theta_0. ends: per replica its theta_i. velocity: v.
        sgd: the outer optimizer.
    """
    means = tuple(torch.stack([to_float64(x) for x in xs]).mean(0) for xs in zip(*ends, strict=True))
    wide = tuple(map(to_float64, start))
    d = [x - mean for x, mean in zip(wide, means, strict=True)]
    v = [sgd.momentum * to_float64(old) + new for old, new in zip(velocity, d, strict=True)]
    steps = [sgd.lr * (new + sgd.momentum * x if sgd.nesterov else x) for new, x in zip(d, v, strict=True)]
    targets = tuple(x - step for x, step in zip(wide, steps, strict=True))
    if form == PLAIN:
        return OuterStep(cast(targets, start), cast(v, velocity))
    new, change, t = shortened(form, start, wide, targets, sgd.limit)
    moved = velocity_in_new_basis(form, tuple(v), new)
    return OuterStep(cast(new.weights, start), cast(moved, velocity), new.bases, gap(form, ends, means), change, t)


def shortened(
    form: str, start: Weights, wide: Weights, targets: Weights, limit: float | None
) -> tuple[Candidate, Tensor, Tensor]:
    """(candidate, ||dW||_2, t) of the longest step tried that is within the limit."""
    t = torch.ones(wide[0].shape[:-2], dtype=wide[0].dtype, device=wide[0].device)
    for attempt in range(ATTEMPTS + 1):
        new = candidate(form, wide, targets, t)
        change = update_norm(*product(form, wide), *product(form, cast(new.weights, start)))
        long = ~(MARGIN * change <= (torch.inf if limit is None else limit))  # NaN is too long as well
        if limit is None or not bool(long.any()):
            break
        shorter = (0.98 * limit / change).nan_to_num(0.0, 0.0, 0.0).clamp_max(0.95)
        t = torch.where(long, 0.0 if attempt == ATTEMPTS - 1 else t * shorter, t)
    return new, change, t


def candidate(form: str, wide: Weights, targets: Weights, t: Tensor) -> Candidate:
    """The step shortened to t (...) of its length, frames orthonormal again; at t = 0 the old weights."""
    steps = [t[..., None, None] if x.dim() == t.dim() + 2 else t[..., None] for x in wide]
    X = tuple(x.lerp(target, step) for x, target, step in zip(wide, targets, steps, strict=True))
    new = Candidate(X) if form == PAIR else orthonormal_triple(*X) if form == TRIPLE else orthonormal_frame(*X)
    still = (t == 0)[..., None, None]
    weights = tuple(
        torch.where(step == 0, x, y) for x, y, step in zip(wide, new.weights, steps, strict=True)
    )  # lerp alone would still go through the retraction
    identity = torch.eye(wide[0].shape[-1], dtype=wide[0].dtype, device=wide[0].device)
    return Candidate(weights, *(tuple(torch.where(still, identity, T) for T in part) for part in new[1:]))


def orthonormal_triple(X_U: Tensor, X_V: Tensor, x_s: Tensor) -> Candidate:
    """(U, V, s) with U diag(s) V^T = X_U diag(x_s) X_V^T; roots are H_U, H_V, P, Z."""
    (Q_U, H_U), (Q_V, H_V) = frame_factor(X_U, "polar"), frame_factor(X_V, "polar")
    P, s, Z = aligned_svd((H_U * x_s[..., None, :]) @ H_V, x_s)
    return Candidate((Q_U @ P, Q_V @ Z, s), (H_U @ P, H_V @ Z), (H_U, H_V, P, Z))


def orthonormal_frame(X_A: Tensor, X_V: Tensor) -> Candidate:
    """(A, V) with A V^T = X_A X_V^T; A = X_A H has T = H^-1, V = X_V H^-1 has T = H."""
    V, H = frame_factor(X_V, "polar")
    identity = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).expand_as(H)
    return Candidate((X_A @ H, V), (times_inverse(identity, H), H), (H,))


def velocity_in_new_basis(form: str, v: Weights, new: Candidate) -> Weights:
    """The outer momentum as displacements of the new factors."""
    if form == FRAME:
        (H,) = new.roots
        return v[0] @ H, times_inverse(v[1], H)
    if form == TRIPLE:
        H_U, H_V, P, Z = new.roots
        v_s = ((P.mT @ H_U) * (Z.mT @ H_V)) @ v[2].unsqueeze(-1)  # the diagonal of P^T H_U diag(v_s) H_V Z
        return times_inverse(v[0], H_U) @ P, times_inverse(v[1], H_V) @ Z, v_s.squeeze(-1)
    return v


def at_other_ranks(old: Weights, new: Weights, velocity: Weights) -> Weights:
    """The outer momentum of factors that were given another rank as A' = A T, which displacements follow: v T.

    T is read off the factors; of s that of U, which selects columns. New columns have no momentum.
    """
    Ts = [torch.linalg.pinv(to_float64(X)) @ to_float64(Y) for X, Y in zip(old[:2], new[:2], strict=True)]
    wide = [to_float64(v) for v in velocity]
    moved = [v @ T for v, T in zip(wide[:2], Ts, strict=True)]
    moved += [(v.unsqueeze(-2) @ Ts[0]).squeeze(-2) for v in wide[2:]]
    return cast(moved, velocity)


def product(form: str, weights: Weights) -> tuple[Tensor, Tensor]:
    """(L, R) with W = L R^T, in float64."""
    left, right, *s = map(to_float64, weights)
    return (left * s[0][..., None, :] if form == TRIPLE else left), right


def gap(form: str, ends: Sequence[Weights], means: Weights) -> Tensor:
    """||mean of the replicas' W - W of their mean factors||_2 (...), without a difference of products."""
    n = len(ends)
    products = [product(form, end) for end in ends]
    left, right = (sum(sides[1:], sides[0]) / n for sides in zip(*products, strict=True))
    lefts, rights = [(L - left) / n for L, _ in products], [R - right for _, R in products]
    if form == TRIPLE:
        U, _, s = means
        lefts.append(sum((to_float64(e[0]) - U) * (to_float64(e[2]) - s)[..., None, :] for e in ends) / n)
        rights.append(right)
    return product_norm(torch.cat(lefts, -1), torch.cat(rights, -1))


def cast(weights: Sequence[Tensor], like: Sequence[Tensor]) -> Weights:
    """In the dtypes and on the devices of others."""
    return tuple(x.to(y) for x, y in zip(weights, like, strict=True))
