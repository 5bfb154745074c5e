"""Gram matrices of tall matrices, the one product through which all non-linear algebra here goes.

    G = X^T X,   X: (..., d, r) with d >= r,   G: (..., r, r)

Costs 2 d r^2 FLOPs; everything after it is O(r^3). Where the rows of X are spread over processes, `reduce` sums the
local Gram matrices and the same code serves shards. Products run in float32 at least (bf16 matmuls are slow on CPUs
and lose the small singular values anywhere), with TF32 off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nativerank.linalg.host import anywhere, asks_for_free

Reduce = Callable[[Tensor], Tensor]
PANEL = 64


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keeps TF32 out of float32 products on CUDA: its 10-bit mantissa breaks r x r iterations."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul  # allow_tf32, the older name, raises once a user has touched the newer one
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def at_least_float32(X: Tensor) -> Tensor:
    """X itself in float32 or float64, else a float32 copy."""
    return X if X.dtype in (torch.float32, torch.float64) else X.float()


def to_float64(X: Tensor) -> Tensor:
    """X in float64; on the CPU where the device is MPS, which has none."""
    return (X.cpu() if X.device.type == "mps" else X).double()


def gram(X: Tensor, reduce: Reduce | None = None) -> Tensor:
    """X^T X (..., r, r) of X (..., d, r), in float32 or float64.

    Args:
        X: stack of tall matrices, or this process's rows of it.
        reduce: sums the local result over the processes that hold the other rows.
    """
    X = at_least_float32(X)
    with full_precision(X.device):
        G = symmetric_product(X.mT, X)
    return reduce(G) if reduce else G


def symmetric_product(X: Tensor, Y: Tensor) -> Tensor:
    """X Y (..., r, r) where that is known to be symmetric.

    On a CPU, where narrow products are fast, its upper half alone is computed, PANEL rows at a time: 0.7 of the time.
    """
    r = X.shape[-2]
    if X.device.type != "cpu" or r < 2 * PANEL:
        return X @ Y
    G = X.new_empty(*X.shape[:-2], r, r)
    for i in range(0, r, PANEL):
        rows = X[..., i : i + PANEL, :] @ Y[..., i:]
        G[..., i : i + PANEL, i:] = rows
        G[..., i + PANEL :, i : i + PANEL] = rows[..., PANEL:].mT
    return G


def gram_root(X: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Some S (..., r, r) in float64 with S^T S = X^T X, so that X y and S y have the same length for every y.

    `reduce` as in `gram`. From the eigenvalues of the float64 Gram matrix: works for zero and rank-deficient X, where
    Cholesky stops; NaN for an X that is not finite.
    Singular values of X below about 1e-8 of the largest are lost. MPS has no float64, so there it runs on the CPU.
    """
    return symmetric_root(gram(to_float64(X), reduce))


def symmetric_root(G: Tensor) -> Tensor:
    """Some S (..., r, r) with S^T S = G of a float64 Gram matrix G (..., r, r); NaN where that is not finite."""
    G, finite = split_finite(G)
    eigenvalues, vectors = torch.linalg.eigh(G)
    root = eigenvalues.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
    return root.masked_fill(~finite[..., None, None], torch.nan)


def split_finite(G: Tensor) -> tuple[Tensor, Tensor]:
    """(G with zeros in the place of matrices that are not finite, which of them (...) are).

    Eigenvalue routines raise on NaN and infinity; whoever calls them puts NaN back where it belongs.
    """
    # The diagonal tells: |G_ij| <= sqrt(G_ii G_jj) in a Gram matrix, and what follows from a bad one is NaN all over.
    finite = G.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    clean = asks_for_free(G) and not anywhere(~finite)
    return (G if clean else G.masked_fill(~finite[..., None, None], 0.0)), finite
