"""Update rules of W = U diag(s) V^T and W = A V^T on row shards: sct, tsvd, stiefel-spectron, frame-spectron.

Formulas and options are those of `optim.frames`, the way back to a frame is that of `optim.gram_steps`. s lies whole on
every process; who solves steps it, and has its moments and tsvd's R.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nativerank.linalg.gram import at_least_float32, gram, to_float64
from nativerank.linalg.host import anywhere
from nativerank.linalg.roots import identity, triangular_inverse
from nativerank.optim.ask import Ask, Asking, symmetric, upper, whole
from nativerank.optim.directions import New, Options, Stack, State, adamw_direction, formed
from nativerank.optim.frames import frame_rho, in_new_basis, news
from nativerank.optim.gram_products import (
    Pair,
    Parts,
    RowsOf,
    Totals,
    change,
    factors_of,
    momenta,
    pair_of,
    solve_spectron,
    spectron_parts,
    spectron_record,
    symmetrized,
)
from nativerank.optim.gram_steps import (
    Step,
    factor,
    framed,
    framing,
    joint_gram,
    joint_parts,
    moment_parts,
    projected,
    projections,
    solve_frames,
    solve_spectrum,
    spectrum_parts,
    square_parts,
    stepped,
    stepped_s,
    tilted,
    triangle,
)


def sct(U: Stack, V: Stack, s: Stack, options: Options, rows: RowsOf) -> Asking:
    """(U, V, s, record) of this process's rows after the step."""
    sides = [U, V]
    if options["riemannian"]:
        K = yield Ask(projections(sides, [side.grad for side in sides], rows))
        sides = [replace(side, grad=projected(side, side.grad, K[f"K_{i}"])) for i, side in enumerate(sides)]
    D = [adamw_direction(side, options) for side in sides]
    X, parts = [side.weight - d for side, d in zip(sides, D, strict=True)], spectrum_parts(s)
    count, every = U.state["step"], options["retract_every"]
    if every > 1 and len(count) and not anywhere(count % every == 0, ordinary=True):  # on the host but on CUDA
        answer = yield Ask(parts, solve_spectrum)
        return news((X[0], X[1], answer["s"]), {})
    parts |= joint_parts(sides, D, rows) if options["riemannian"] else square_parts(X, rows)
    answer = yield Ask(parts | moment_parts(sides, D, options, rows), partial(solve_sct, dtype=D[0].dtype))
    if options["riemannian"]:
        X = [stepped(side, D[i], Step(T=tilted(answer[f"K_{i}"])), answer[f"tame_{i}"]) for i, side in enumerate(sides)]
    U_new, V_new = framed(sides, X, answer)
    return news((U_new, V_new, answer["s"]), {})


def solve_sct(totals: Totals, small: list[State], options: Options, dtype: torch.dtype) -> Parts:
    """What makes frames of X = U - D, or with tangent steps of X = U - (D - U K)."""
    s, steps, parts = stepped_s(totals, small, options), [Step(), Step()], Parts()
    if options["riemannian"]:
        K = [symmetrized(totals[f"UE_{i}"]).to(dtype) for i in range(2)]
        steps, parts = [Step(T=tilted(k)) for k in K], {f"K_{i}": symmetric(k) for i, k in enumerate(K)}
    return parts | solve_frames(totals, s, steps, options, dtype)


def stiefel_spectron(U: Stack, V: Stack, s: Stack, options: Options, rows: RowsOf) -> Asking:
    """(U, V, s, record) of this process's rows after the step; the record holds rho (n)."""
    sides, M = [U, V], momenta(U, V, options)
    if options["riemannian"]:
        K = yield Ask(projections(sides, M, rows))
        M = [projected(side, m, K[f"K_{i}"]) for i, (side, m) in enumerate(zip(sides, M, strict=True))]
    pair = pair_of(U, V, M, options)
    parts = spectrum_parts(s) | joint_parts(sides, M, rows) | moment_parts(sides, M, options, rows)
    answer = yield Ask(parts, partial(solve_stiefel, pair=pair))
    q = [factor(answer.get(f"Q_{i}"), answer["rho"], scale, M[i]) for i, scale in enumerate(pair.scales)]
    X = [stepped(side, M[i], Step(q=q[i]), answer[f"tame_{i}"]) for i, side in enumerate(sides)]
    U_new, V_new = framed(sides, X, answer)
    return news((U_new, V_new, answer["s"]), {"rho": answer["rho"]})


def solve_stiefel(totals: Totals, small: list[State], options: Options, pair: Pair) -> Parts:
    """Q, rho and what makes frames of X = U - rho M Q."""
    Q = factors_of(totals, options, pair, "EE")
    rho = frame_rho(totals["s"].abs().amax(-1), options).to(pair.dtype)
    q = [factor(None if Q is None else Q[i], rho, scale, totals["UU_0"]) for i, scale in enumerate(pair.scales)]
    parts = {"rho": whole(rho)} | ({} if Q is None else {f"Q_{i}": symmetric(x) for i, x in enumerate(Q)})
    s = stepped_s(totals, small, options)
    return parts | solve_frames(totals, s, [Step(q=x) for x in q], options, pair.dtype)


def tsvd(U: Stack, V: Stack, s: Stack, options: Options, rows: RowsOf) -> Asking:
    """(U, V, s, record) of this process's rows after the step; R^-1 is in the state, R with who solves."""
    sides, X, kept = [U, V], [], 1 - options["lr"] * options["weight_decay"]
    Q = [at_least_float32(side.weight) for side in sides]
    dQ = [side.grad.to(q) for side, q in zip(sides, Q, strict=True)]
    T = yield Ask({f"T_{i}": upper((rows(q).mT @ rows(dQ[i])).triu()) for i, q in enumerate(Q)})
    for i, (side, q) in enumerate(zip(sides, Q, strict=True)):
        S, inverse = T[f"T_{i}"] + T[f"T_{i}"].triu(1).mT, side.state["R_inverse"]
        raw = (dQ[i] - q @ S) @ inverse.mT  # dA, as in `qr_vjp`
        X.append(kept * q - adamw_direction(replace(side, grad=raw), options) @ inverse)
    answer = yield Ask(spectrum_parts(s) | square_parts(X, rows), solve_tsvd)
    for i, side in enumerate(sides):
        side.state["R_inverse"].copy_(answer[f"R_inverse_{i}"])
    U_new, V_new = framed(sides, X, answer)
    return news((U_new, V_new, answer["s"]), {})


def solve_tsvd(totals: Totals, small: list[State], options: Options) -> Parts:
    """What makes frames of X = Q' R_x; advances R' = R_x R."""
    parts = solve_spectrum(totals, small, options)
    for i in range(2):
        R_x, inverse, tame = framing(totals[f"XX_{i}"], None, options)
        R = small[i]["R"]
        R.copy_(R_x @ to_float64(R))
        parts |= {f"C_{i}": upper(inverse), f"R_inverse_{i}": upper(triangular_inverse(to_float64(R)).to(R.dtype))}
        parts[f"tame_{i}"] = whole(tame)
    return parts


def frame_spectron(A: Stack, V: Stack, options: Options, rows: RowsOf) -> Asking:
    """(A, V, record) of this process's rows after Spectron's step, in the gauge in which V is orthonormal."""
    M, kept = momenta(A, V, options), 1 - options["lr"] * options["weight_decay"]
    pair = pair_of(A, V, M, options)
    parts = spectron_parts(A, V, M, options, rows, wide=(options["certified"], True))
    parts["UE"] = whole(to_float64(rows(V.weight)).mT @ to_float64(rows(M[1])))
    if options["nesterov"] or "G_0" not in parts:
        parts["own"] = symmetric(gram(rows(at_least_float32(A.state["momentum"]))))
    answer = yield Ask(parts, partial(solve_frame_spectron, pair=pair))
    record = spectron_record(A, V, answer, options)
    D_A = change(M[0], answer.get("Q_0"), answer["rho"] * pair.scales[0], options["certified"])
    X = stepped(V, M[1], Step(q=factor(answer.get("Q_1"), answer["rho"], pair.scales[1], M[1])), answer["tame"])
    A_new = (kept * at_least_float32(A.weight) - formed(D_A)) @ answer["R"].mT
    in_new_basis(A.state, answer["back"])  # only now: M may be the momentum itself
    in_new_basis(V.state, answer["R"].mT)
    return New(A_new), New((X @ answer["C"].to(X)).to(A_new)), record


def solve_frame_spectron(totals: Totals, small: list[State], options: Options, pair: Pair) -> Parts:
    """Spectron's answer, R and C = R^-1 of X = V - rho M Q, and for A's momentum R^-1, or I where that is no use."""
    parts, form = solve_spectron(totals, small, options, pair), triangle(options)
    Q = parts["Q_1"].tensor if "Q_1" in parts else None
    q = factor(Q, parts["rho"].tensor, pair.scales[1], totals["W_1"])
    R, inverse, tame = framing(*joint_gram(totals["W_1"], totals["UE"], totals["G_1"], Step(q=q)), options)
    own = to_float64(totals["own"] if "own" in totals else totals["G_0"])
    before, after = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (own, inverse.mT @ own @ inverse))
    good = (after <= 1e4 * before)[..., None, None]  # as in `times_inverse`; NaN is no good
    back = torch.where(good, inverse, identity(inverse))
    return parts | {
        "R": form(R.to(pair.dtype)),
        "back": form(back.to(pair.dtype)),
        "C": form(inverse),
        "tame": whole(tame),
    }


GRAM_FRAMES: dict[str, Callable[..., Any]] = {
    "sct": sct,
    "tsvd": tsvd,
    "stiefel-spectron": stiefel_spectron,
    "frame-spectron": frame_spectron,
}
