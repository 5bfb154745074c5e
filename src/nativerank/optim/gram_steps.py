"""From a frame U to the next one on row shards: sums that are taken before the step exists, and r x r answers.

A step leads to X = U T - E q, with E the direction (rows like U) and T, q small: T = I + K with K = sym(U^T D) where a
direction D is made tangent, and I elsewhere. One pass makes it a frame:

    X^T X = T^T (U^T U) T - T^T (U^T E) q - q^T (E^T U) T + q^T (E^T E) q = R^T R,      U <- X R^-1 = X C

Sums and R are float64, and so are X and X C where C magnifies the rounding of float32 (on a GPU always, which asks
nothing of the host): frames are as orthonormal as their dtype for X of condition up to about 1e5, a step that nearly
undoes a column of U. Beyond that, and where X has lost its rank, they are NaN: there is no Householder QR of rows that
nobody has together. Where X is at hand before the exchange its own X^T X is summed.
With `preserve` C = R^-1 P, and moments of U become those of U (R^T P); with `riemannian` they lose U sym(U^T m).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nativerank.linalg.gram import at_least_float32, gram, to_float64
from nativerank.linalg.host import anywhere, asks_for_free
from nativerank.linalg.roots import LIMIT, gram_root_and_inverse, growth, identity
from nativerank.optim.ask import Answer, Part, symmetric, upper, whole
from nativerank.optim.directions import Options, Stack, State
from nativerank.optim.frames import aligned_svd, first_moment, in_new_basis, stepped_spectrum
from nativerank.optim.gram_products import Parts, RowsOf, Totals, symmetrized

TAME = 64.0  # growth of rounding up to which X C in float32 leaves 2 eps sqrt(growth), 1e-6, in Q^T Q


class Step(NamedTuple):
    """X = U T - E q of one side, as whoever solves knows it; None is I."""

    T: Tensor | None = None
    q: Tensor | None = None


Root = tuple[Tensor, Tensor, Tensor]

# -- each process, before -------------------------------------------------------------------------------------------


def projections(sides: Sequence[Stack], G: Sequence[Tensor], rows: RowsOf) -> Parts:
    """Sums for the tangent parts of G: sym(U^T G)."""
    pairs = ((rows(at_least_float32(side.weight)), rows(g)) for side, g in zip(sides, G, strict=True))
    return {f"K_{i}": symmetric(symmetrized(u.mT @ g.to(u))) for i, (u, g) in enumerate(pairs)}


def projected(side: Stack, G: Tensor, K: Tensor) -> Tensor:
    """G - U K."""
    U = at_least_float32(side.weight)
    return G.to(U) - U @ K


def spectrum_parts(s: Stack) -> Parts:
    """s and its gradient."""
    return {"s": whole(s.weight), "s_grad": whole(s.grad)}


def square_parts(X: Sequence[Tensor], rows: RowsOf) -> Parts:
    """X^T X."""
    return {f"XX_{i}": symmetric(gram(to_float64(rows(x)))) for i, x in enumerate(X)}


def joint_parts(sides: Sequence[Stack], E: Sequence[Tensor], rows: RowsOf) -> Parts:
    """U^T U, U^T E and E^T E."""
    parts = Parts()
    for i, (side, e) in enumerate(zip(sides, E, strict=True)):
        u, e = to_float64(rows(side.weight)), to_float64(rows(e))
        parts |= {f"UU_{i}": symmetric(gram(u)), f"UE_{i}": whole(u.mT @ e), f"EE_{i}": symmetric(gram(e))}
    return parts


def moment_parts(sides: Sequence[Stack], E: Sequence[Tensor], options: Options, rows: RowsOf) -> Parts:
    """With `riemannian`, U^T m and E^T m of the first moments."""
    parts = Parts()
    for i, (side, e) in enumerate(zip(sides, E, strict=True) if options["riemannian"] else ()):
        m = rows(at_least_float32(first_moment(side)))
        parts |= {f"Um_{i}": whole(rows(side.weight).to(m).mT @ m), f"Em_{i}": whole(rows(e).to(m).mT @ m)}
    return parts


# -- whoever solves -------------------------------------------------------------------------------------------------


def solve_spectrum(totals: Totals, small: list[State], options: Options) -> Parts:
    """s alone."""
    return {"s": whole(stepped_s(totals, small, options))}


def stepped_s(totals: Totals, small: list[State], options: Options) -> Tensor:
    """s (m, r) after decay and AdamW, whose moments advance."""
    s = totals["s"]
    return stepped_spectrum(Stack(totals["s_grad"], small[2], tuple(s.shape[1:]), s), options)


def solve_frames(totals: Totals, s: Tensor, steps: Sequence[Step], options: Options, dtype: torch.dtype) -> Parts:
    """C and s, and of moments their new basis T and the part N that is normal to the new tangent space."""
    roots = [framing(*square(totals, i, step), options) for i, step in enumerate(steps)]
    form, C, parts = triangle(options), [inverse for _, inverse, _ in roots], tameness(roots)
    if options["preserve"]:
        R_U, R_V = (R for R, _, _ in roots)
        P, values, Z = aligned_svd((R_U * to_float64(s)[..., None, :]) @ R_V.mT, to_float64(s))
        form, s, C = whole, values.to(s), [inverse @ B for inverse, B in zip(C, (P, Z), strict=True)]
        parts |= {f"T_{i}": whole((R.mT @ B).to(dtype)) for i, (R, B) in enumerate(((R_U, P), (R_V, Z)))}
    for i, step in enumerate(steps if options["riemannian"] else ()):
        Um, Em = to_float64(totals[f"Um_{i}"]), to_float64(totals[f"Em_{i}"])
        along = C[i].mT @ (transposed(step.T, Um) - transposed(step.q, Em))  # U_new^T m
        along = along @ to_float64(parts[f"T_{i}"].tensor) if options["preserve"] else along
        parts[f"N_{i}"] = symmetric(symmetrized(along).to(dtype))
    return parts | {f"C_{i}": form(c) for i, c in enumerate(C)} | {"s": whole(s)}


def square(totals: Totals, i: int, step: Step) -> tuple[Tensor, Tensor | None]:
    """X^T X of a side, and the size of what it was made of."""
    if f"XX_{i}" in totals:
        return totals[f"XX_{i}"], None
    return joint_gram(totals[f"UU_{i}"], totals[f"UE_{i}"], totals[f"EE_{i}"], step)


def joint_gram(UU: Tensor, UE: Tensor, EE: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """(X^T X, squares (..., r)) of X = U T - E q: the rounding of X^T X is that of numbers of the size of squares.

    Of E q these are ||E||_F |q_i|, which may be far above what is left of it in X.
    """
    T, q = (identity(UU) if x is None else to_float64(x) for x in step)
    cross, parts = T.mT @ UE @ q, EE.diagonal(dim1=-2, dim2=-1)
    G = T.mT @ UU @ T - cross - cross.mT + q.mT @ EE @ q
    if step.q is not None:  # multiplied before it is squared: where E is zero, q may be huge
        parts = (q * parts.sum(-1).clamp_min(0).sqrt()[..., None, None]).square().sum(-2)
    squares = (T * (UU @ T)).sum(-2) + parts
    return symmetrized(G), squares


def framing(G: Tensor, squares: Tensor | None, options: Options) -> Root:
    """(R, R^-1, tame) with X R^-1 a frame; NaN where float64 does not make it one to 1e-5, so that no process stops
    alone; tame (m) where float32 is enough for the product."""
    way = "polar" if options["retraction"] == "polar" else "cholesky"
    R, inverse, good = gram_root_and_inverse(G, way, LIMIT[torch.float32], squares)
    bad = ~good[..., None, None]
    return R.masked_fill(bad, torch.nan), inverse.masked_fill(bad, torch.nan), growth(G, inverse, squares) <= TAME


def tameness(roots: Sequence[Root]) -> Parts:
    """Of each side, whether float32 is enough to make its frame."""
    return {f"tame_{i}": whole(tame) for i, (_, _, tame) in enumerate(roots)}


def triangle(options: Options) -> Callable[[Tensor], Part]:
    """How roots travel: triangular, or symmetric."""
    return symmetric if options["retraction"] == "polar" else upper


def transposed(T: Tensor | None, Y: Tensor) -> Tensor:
    """T^T Y; None is I."""
    return Y if T is None else to_float64(T).mT @ Y


# -- both, on the same numbers --------------------------------------------------------------------------------------


def factor(Q: Tensor | None, rho: Tensor, scale: float, like: Tensor) -> Tensor:
    """q = scale rho Q (n, r, r) in float64; None is I."""
    Q = identity(to_float64(like)) if Q is None else to_float64(Q)
    return Q * to_float64(rho * scale)[..., None, None]


def tilted(K: Tensor) -> Tensor:
    """T = I + K in float64."""
    return identity(to_float64(K)) + to_float64(K)


# -- each process, after --------------------------------------------------------------------------------------------


def wide_enough(X: Tensor, tame: Tensor) -> Tensor:
    """X in the dtype that its frame is made in."""
    # A GPU would make the host wait, and is fast in float64.
    return at_least_float32(X) if asks_for_free(tame) and not anywhere(~tame) else to_float64(X)


def stepped(side: Stack, E: Tensor, step: Step, tame: Tensor) -> Tensor:
    """X = U T - E q of this process's rows."""
    U = wide_enough(side.weight, tame)
    E = E.to(U)
    return (U if step.T is None else U @ step.T.to(U)) - (E if step.q is None else E @ step.q.to(U))


def framed(sides: Sequence[Stack], X: Sequence[Tensor], answer: Answer) -> list[Tensor]:
    """The new frames; first and second moments follow where the basis or the tangent space changes."""
    found = []
    for i, (side, x) in enumerate(zip(sides, X, strict=True)):
        x = wide_enough(x, answer[f"tame_{i}"])
        Q = (x @ answer[f"C_{i}"].to(x)).to(at_least_float32(side.weight))
        if f"T_{i}" in answer:
            in_new_basis(side.state, answer[f"T_{i}"])
        if f"N_{i}" in answer:
            m = first_moment(side)
            m.copy_(m.to(Q) - Q @ answer[f"N_{i}"])
        found.append(Q)
    return found
