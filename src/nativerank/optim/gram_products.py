"""Update rules of a dense W and of W = A B^T on row shards: muon, spectron, adamw-capped, adam-muon.

Formulas and options are those of `optim.products`; here every r x r problem is solved once, from sums over processes:

    G = M^T M     of what is orthogonalized: Q with O = M Q
    W = X^T X     of each factor: its norm, and with X^T u the whole power iteration, after which u = X c
    ||M Q||       from Q^T G Q, where a step is measured before it exists (`proven_norm`)

M is this process's rows (n, d_local, r); whoever drives the rules keeps TF32 off. What a bound is proven for goes
through float64: sums, and the product M Q.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nativerank.linalg.gram import at_least_float32, gram, to_float64
from nativerank.linalg.norms import gram_norm, gram_power_iteration
from nativerank.optim.ask import Answer, Ask, Asking, Part, symmetric, whole
from nativerank.optim.directions import (
    MARGIN,
    NONE,
    Difference,
    Options,
    Product,
    Stack,
    State,
    adamw_direction,
    averaged,
    gram_factors,
    pair_rho,
    rho_within,
    shape_scale,
)
from nativerank.optim.products import scheduled_cap

RowsOf = Callable[[Tensor], Tensor]
Totals = Mapping[str, Tensor]
Parts = dict[str, Part]
EPS = torch.finfo(torch.float64).eps


class Pair(NamedTuple):
    """What whoever solves must know of both sides: the factor on each O, rows of the whole factors, dtype of M."""

    scales: tuple[float, float]
    heights: tuple[int, int]
    dtype: torch.dtype


def muon(side: Stack, options: Options, rows: RowsOf) -> Asking:
    """D of this process's rows: the orthogonalized momentum times its shape scale, times lr."""
    M = at_least_float32(averaged(side, options))
    scale = options["lr"] * shape_scale(options["shape_scale"], *side.shape)
    if options["orthogonalizer"] == NONE:
        yield Ask({"nothing": whole(M.new_zeros(len(M), 0))}, lambda *_: {})
        return scale * M
    answer = yield Ask({"G": symmetric(gram(rows(M)))}, solve_muon)
    return Product(M, scale * answer["Q"])


def solve_muon(totals: Totals, small: list[State], options: Options) -> Parts:
    """Q of every unit."""
    return {"Q": symmetric(symmetrized(gram_factors(totals["G"], options)))}


def spectron(A: Stack, B: Stack, options: Options, rows: RowsOf) -> Asking:
    """(D_A, D_B, record) of this process's rows."""
    M, certified = momenta(A, B, options), options["certified"]
    pair = pair_of(A, B, M, options)
    parts = spectron_parts(A, B, M, options, rows, wide=(certified, certified))
    answer = yield Ask(parts, partial(solve_spectron, pair=pair))
    D_A, D_B = (change(m, answer.get(f"Q_{i}"), answer["rho"] * pair.scales[i], certified) for i, m in enumerate(M))
    return D_A, D_B, spectron_record(A, B, answer, options)


def momenta(A: Stack, B: Stack, options: Options) -> list[Tensor]:
    """What is orthogonalized, of both sides; advances the momenta."""
    return [at_least_float32(averaged(side, options)) for side in (A, B)]


def pair_of(A: Stack, B: Stack, M: list[Tensor], options: Options) -> Pair:
    """The sides as `solve` sees them."""
    scale_A, scale_B = (shape_scale(options["shape_scale"], *side.shape) for side in (A, B))
    return Pair((scale_A, scale_B), (max(A.shape), max(B.shape)), M[0].dtype)


def spectron_parts(
    A: Stack, B: Stack, M: list[Tensor], options: Options, rows: RowsOf, wide: tuple[bool, bool]
) -> Parts:
    """Sums for Q and the norms of the factors; of each side in float64 if wanted."""
    parts = Parts()
    for i, (side, m) in enumerate(zip((A, B), M, strict=True)):
        if wide[i] or options["orthogonalizer"] != NONE:
            parts[f"G_{i}"] = symmetric(gram(widest(rows(m), wide[i])))
        X = widest(rows(side.weight), wide[i])
        parts[f"W_{i}"] = symmetric(gram(X))
        if options["norm"] == "power":
            u = rows(side.state["power_vector"]).to(X)
            parts[f"start_{i}"] = whole((u.unsqueeze(-2) @ X).squeeze(-2))
    return parts


def widest(X: Tensor, wide: bool) -> Tensor:
    """X in float64 if wanted, else in float32 at least."""
    return to_float64(X) if wide else at_least_float32(X)


def solve_spectron(totals: Totals, small: list[State], options: Options, pair: Pair) -> Parts:
    """rho, norms, Q and what advances the power vectors, of every unit."""
    Q, parts, sigma = factors_of(totals, options, pair), Parts(), []
    for i in range(2):
        W = totals[f"W_{i}"]
        if options["norm"] == "power":
            norm, c = gram_power_iteration(W, totals[f"start_{i}"], options["power_iterations"])
            parts[f"c_{i}"] = whole(c.to(pair.dtype))
        else:
            norm = gram_norm(W)
        sigma.append(norm.to(pair.dtype))
        parts[f"sigma_{i}"] = whole(sigma[i])
        if Q is not None:
            parts[f"Q_{i}"] = symmetric(Q[i])
    certified = options["certified"]
    rho = measured_rho(totals, Q, pair, options["lr"]) if certified else pair_rho(sigma[0] + sigma[1], options)
    return parts | {"rho": whole(rho)}


def factors_of(totals: Totals, options: Options, pair: Pair, name: str = "G") -> Tensor | None:
    """Q (2, m, r, r) of both sides, exactly symmetric, as all processes will have it; None for the identity."""
    if options["orthogonalizer"] == NONE:
        return None
    G = torch.stack([totals[f"{name}_{i}"].to(pair.dtype) for i in range(2)])
    return symmetrized(gram_factors(G, options))


def symmetrized(G: Tensor) -> Tensor:
    """The symmetric part of G."""
    return (G + G.mT) / 2


def spectron_record(A: Stack, B: Stack, answer: Answer, options: Options) -> State:
    """The record of a step; advances the power vectors."""
    if options["norm"] == "power":
        for i, side in enumerate((A, B)):
            advance_vector(side, answer[f"c_{i}"])
    return {"sigma_A": answer["sigma_0"], "sigma_B": answer["sigma_1"], "rho": answer["rho"]}


def advance_vector(side: Stack, c: Tensor) -> None:
    """u <- X c, where X u was not zero."""
    X, u = at_least_float32(side.weight), side.state["power_vector"]
    Xc = (c.unsqueeze(-2) @ X.mT).squeeze(-2)
    u.copy_(torch.where((c != 0).any(-1, keepdim=True), Xc, u.to(Xc)))


def change(M: Tensor, Q: Tensor | None, rho: Tensor, wide: bool) -> Difference:
    """D = rho M Q for rho (n); rounded once, from float64, where its norm was measured before it existed."""
    rho = rho[..., None, None]
    if Q is None:
        return M * rho
    if wide:
        return (to_float64(M) @ (to_float64(Q) * to_float64(rho))).to(M)
    return Product(M, Q * rho)


def measured_rho(totals: Totals, Q: Tensor | None, pair: Pair, eta: float) -> Tensor:
    """rho (m) for which ||dW||_2 <= eta is proven, as in `certified_rho`, from norms of products not yet formed."""
    c = [
        MARGIN * scale * proven_norm(totals[f"G_{i}"], None if Q is None else Q[i], height)
        for i, (scale, height) in enumerate(zip(pair.scales, pair.heights, strict=True))
    ]
    a, b = (MARGIN * gram_norm(totals[f"W_{i}"]) for i in range(2))
    return rho_within(eta, c[0], c[1], a, b, pair.dtype)


def proven_norm(G: Tensor, Q: Tensor | None, height: int) -> Tensor:
    """A bound (...) on ||M Q||_2 up to MARGIN, and on what float64 makes of M Q, from float64 sums G of M^T M.

    Proof. u = EPS / 2, gamma_k = k u / (1 - k u), f = ||Q||_F ||M||_F, M of d rows, H = Q^T G Q as computed.
      1. In any order of summation |G - M^T M| <= gamma_d |M|^T |M|, whose norm is at most gamma_d ||M||_F^2.
      2. Two products of r terms make of Q^T G Q an H that is off by at most 2 gamma_r ||Q||_F^2 ||G||_F to first order,
         and ||G||_F <= trace(G) = ||M||_F^2 up to 1.
      3. So ||M Q||^2 <= lambda_max(H) + (gamma_d + 2 gamma_r) f^2 <= lambda_max(H) + (d + 3 r) u f^2: half of what is
         added here. Q is taken as it is, symmetric or not, orthogonalizing or not.
      4. The product formed in float64 is off by e <= gamma_r f, and (||M Q|| + e)^2 <= (1 + t) ||M Q||^2 +
         (1 + 1 / t) e^2. With t = 1e-5 the first is inside MARGIN^2, the second below r u f^2: the other half.
    MARGIN also covers the eigenvalue routine and the rounding of D = rho M Q to its own dtype, at most u' ||D||_F <=
    u' sqrt(r) ||D||_2 (below 1e-5 in float32 for r < 1e4).
    """
    r, size = G.shape[-1], G.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0).sqrt()  # ||M||_F
    if Q is not None:
        Q = to_float64(Q)
        peak = Q.abs().amax((-2, -1)).clamp_min(torch.finfo(Q.dtype).tiny)  # for where M is zero, Q is huge
        G, size = Q.mT @ G @ Q, size * peak * torch.linalg.matrix_norm(Q / peak[..., None, None])
    slack = (EPS * (height + 3 * r)) ** 0.5 * size
    return torch.hypot(gram_norm(symmetrized(G)), slack)


def adamw_capped(A: Stack, B: Stack, options: Options, rows: RowsOf) -> Asking:
    """(D_A, D_B, record) of AdamW on this process's rows of both factors within `update_cap`."""
    D = [adamw_direction(side, options) for side in (A, B)]
    pair = Pair((1.0, 1.0), (max(A.shape), max(B.shape)), D[0].dtype)
    parts = direction_parts(A, B, D, rows, measured=True)
    answer = yield Ask(parts, partial(solve_directions, pair=pair, orthogonal=False))
    rho = answer["cap_factor"]
    return D[0] * rho[..., None, None], D[1] * rho[..., None, None], {"cap_factor": rho}


def adam_muon(A: Stack, B: Stack, options: Options, rows: RowsOf) -> Asking:
    """(D_A, D_B, record) of orthogonalized AdamW directions on this process's rows, within `update_cap` if any."""
    M = [at_least_float32(adamw_direction(x, {**options, "lr": 1.0}, options["nesterov"])) for x in (A, B)]
    scale_A, scale_B = (options["lr"] * shape_scale(options["shape_scale"], *side.shape) for side in (A, B))
    pair = Pair((scale_A, scale_B), (max(A.shape), max(B.shape)), M[0].dtype)
    orthogonal, measured = options["orthogonalizer"] != NONE, options["update_cap"] is not None
    parts = direction_parts(A, B, M, rows, measured) if orthogonal or measured else {"nothing": whole(M[0][:, :0, 0])}
    answer = yield Ask(parts, partial(solve_directions, pair=pair, orthogonal=orthogonal))
    rho = answer.get("cap_factor", M[0].new_ones(len(M[0])))
    D_A, D_B = (change(m, answer.get(f"Q_{i}"), rho * pair.scales[i], measured) for i, m in enumerate(M))
    return D_A, D_B, {"cap_factor": rho} if measured else {}


def direction_parts(A: Stack, B: Stack, M: list[Tensor], rows: RowsOf, measured: bool) -> Parts:
    """Sums for Q, and if they are to be measured in float64 those for the norms of directions and factors."""
    parts = {f"G_{i}": symmetric(gram(widest(rows(m), measured))) for i, m in enumerate(M)}
    if measured:
        parts |= {f"W_{i}": symmetric(gram(to_float64(rows(x.weight)))) for i, x in enumerate((A, B))}
    return parts


def solve_directions(totals: Totals, small: list[State], options: Options, pair: Pair, orthogonal: bool) -> Parts:
    """Q of every unit where directions are orthogonalized, and cap_factor where they are capped."""
    Q = factors_of(totals, options, pair) if orthogonal else None
    parts = {} if Q is None else {f"Q_{i}": symmetric(q) for i, q in enumerate(Q)}
    if options["update_cap"] is not None:
        rho = measured_rho(totals, Q, pair, scheduled_cap(options)).clamp_max(1)
        parts["cap_factor"] = whole(rho)
    return parts


GRAM_PRODUCTS: dict[str, Callable[..., Any]] = {
    "muon": muon,
    "spectron": spectron,
    "adamw-capped": adamw_capped,
    "adam-muon": adam_muon,
}
