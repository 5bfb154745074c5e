"""Orthogonalization and retraction of factors whose rows are spread over processes: once, or on every process.

COUNT factors (d, r), a row shard of each on every process, as one stack (n, d / N, r). What each contestant does:

| way | exchanges | r x r problems per process |
|---|---|---|
| gram | packed Gram triangles to owners, packed answers to everybody | n / N |
| gram-float32 | retraction with sums in float32 too | n / N |
| owner | row shards to owners and back | n / N, on whole matrices |
| gather | all shards to everybody | n, the same algebra |
| gather-qr | all shards to everybody | n Householder QRs with a sign fix |

gram and owner are the two algebras of the optimizer. Its retractions in gram take sums in float64, since there is no
second exchange for factors that float32 does not bring back to a frame; the product is float32 where that suffices, as
here.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nativerank.bench.measure import race
from nativerank.bench.retraction import looped, off_orthonormal
from nativerank.distributed.collectives import exchange
from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import bounds
from nativerank.linalg.gram import gram, to_float64
from nativerank.linalg.orthogonalize import orthogonalize, orthogonalizing_factor
from nativerank.linalg.retract import LIMIT, retract
from nativerank.linalg.roots import gram_root_and_inverse
from nativerank.optim.ask import Part, packed, symmetric, unpacked, upper

COUNT, D, R = 24, 2048, 64
STEP = 0.1  # relative length of the step that is retracted
Whole = Callable[[Tensor], Tensor]
Solve = Callable[[Tensor], Part]
Calls = dict[str, Callable[[], Tensor]]


class Spread:
    """The rows of a stack that this process holds, and which of its matrices every process owns."""

    def __init__(self, whole: Tensor, grid: Grid):
        assert whole.shape[1] % grid.world == 0, "equal shards"
        self.grid, self.rows = grid, bounds(whole.shape[1], grid.world, grid.rank)
        self.held = whole.narrow(1, *self.rows).contiguous()
        owned = (bounds(len(whole), grid.world, rank) for rank in range(grid.world))
        self.owned = [slice(start, start + n) for start, n in owned]

    def to_owners(self, x: Tensor) -> list[Tensor]:
        """What every process holds of the matrices (n, ...) owned here, by rank."""
        mine = x[self.owned[self.grid.rank]]
        expected = [[(tuple(mine.shape), x.dtype)]] * self.grid.world
        return [part for (part,) in exchange([[x[o]] for o in self.owned], expected, self.grid.everyone, x.device)]

    def to_everybody(self, mine: Tensor) -> Tensor:
        """All owners' answers (n, ...)."""
        expected = [[((o.stop - o.start, *mine.shape[1:]), mine.dtype)] for o in self.owned]
        found = exchange([[mine]] * self.grid.world, expected, self.grid.everyone, mine.device)
        return torch.cat([part for (part,) in found])

    def gathered(self) -> Tensor:
        """Whole matrices (n, d, r), here as everywhere."""
        out = self.held.new_empty(self.grid.world, *self.held.shape)
        dist.all_gather(list(out), self.held, group=self.grid.everyone)
        return out.transpose(0, 1).flatten(1, 2)

    def own_rows(self, whole: Tensor) -> Tensor:
        """What this process keeps of them."""
        return whole.narrow(1, *self.rows)


def by_gram(x: Spread, solve: Solve, wide: bool = False) -> Tensor:
    """X Q with Q = solve(X^T X); `wide`: from sums in float64."""
    parts = x.to_owners(packed(symmetric(gram(to_float64(x.held) if wide else x.held))))
    answer = solve(unpacked(sum(parts[1:], parts[0]), "symmetric"))
    return x.held @ unpacked(x.to_everybody(packed(answer)), answer.form).to(x.held.dtype)


def by_owner(x: Spread, whole: Whole) -> Tensor:
    """The rows of whole(X), each matrix done by its owner."""
    done = whole(torch.cat(x.to_owners(x.held), 1))
    expected = [[((o.stop - o.start, *x.held.shape[1:]), done.dtype)] for o in x.owned]
    found = exchange([[rows] for rows in done.chunk(x.grid.world, 1)], expected, x.grid.everyone, done.device)
    return torch.cat([part for (part,) in found])


def inverse_root(G: Tensor) -> Part:
    """R^-1 of the triangular root of G: X R^-1 is the frame of X."""
    return upper(gram_root_and_inverse(G, "cholesky", LIMIT[torch.float32])[1])


def measure_once(grid: Grid, repeats: int) -> list[dict[str, Any]]:
    """Seconds of every round of each way of both tasks, and how far from orthonormal its result is."""
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(COUNT, D, R, generator=generator)
    frames = retract(M) - torch.randn(COUNT, D, R, generator=generator) * (STEP / (D**0.5 + R**0.5))
    momenta, moved = Spread(M, grid), Spread(frames, grid)
    tasks = {
        "orthogonalize": (momenta, ways(momenta, orthogonalize, lambda G: symmetric(orthogonalizing_factor(G)))),
        "retract": (
            moved,
            ways(moved, retract, inverse_root, wide=True) | {"gram-float32": lambda: by_gram(moved, inverse_root)},
        ),
    }
    return [{"task": task, **contest(*what, repeats)} for task, what in tasks.items()]


def ways(x: Spread, whole: Whole, solve: Solve, wide: bool = False) -> Calls:
    """All contestants of a task, given what it does to whole matrices and in r x r."""
    return {
        "gram": lambda: by_gram(x, solve, wide),
        "owner": lambda: by_owner(x, whole),
        "gather": lambda: x.own_rows(whole(x.gathered())),
        "gather-qr": lambda: x.own_rows(torch.stack([looped(X) for X in x.gathered()])),
    }


def contest(x: Spread, calls: Calls, repeats: int) -> dict[str, Any]:
    """By turns, each begun and ended together."""

    def together(call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            call()
            dist.barrier()

        return run

    dist.barrier()
    seconds = race({way: together(call) for way, call in calls.items()}, repeats, torch.device("cpu"))
    return {"seconds": seconds, "off_orthonormal": {way: off_of_rows(x, call()) for way, call in calls.items()}}


def off_of_rows(x: Spread, Q: Tensor) -> float:
    """max |Q^T Q - I| of a stack of which every process holds rows."""
    kept, x.held = x.held, Q.contiguous()
    whole, x.held = x.gathered(), kept
    return off_orthonormal(whole)
