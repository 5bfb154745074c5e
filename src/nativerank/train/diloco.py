"""Replicas that train on their own and meet every H steps (`optim.outer`): what that asks of a run.

    inside a round   gradients, clipping and the inner optimizer belong to a replica: its processes form a grid of their
                     own, and one that is a single process exchanges no gradients at all. Loss and gradient norm are
                     means over all, in the one exchange of a few numbers that every step makes: so the guard's answers,
                     skipped steps and rollbacks, and the end by a signal are the same everywhere.
    at a meeting     the outer step; then looks at ranks, validation, checkpoints and the end, all with the weights that
                     replicas have agreed on. The last step is always one, in a shorter round if need be.
    in a checkpoint  the agreed weights, the outer momentum, and every replica's optimizer state. So a resumed run has
                     the same bits; another number of replicas cannot take it up, another number of shards can.

After a signal the round goes on to its meeting; where the launcher's patience ends before, the last checkpoint stands.
"""

import math
from typing import Any

from nativerank.config import DilocoConfig, RunConfig, differences
from nativerank.distributed.grid import Grid
from nativerank.methods import find_method
from nativerank.optim.outer import Outer
from nativerank.train.setup import Built

BOUNDED = ("spectron", "stiefel-spectron", "frame-spectron")  # rules whose lr bounds ||dW||_2
BETTER_IN_SHORT_RUNS = 0.5  # outer momentum; measured at 15 meetings of pocket, against the published 0.9


def check_diloco(config: RunConfig, grid: Grid) -> None:
    """Raises a ValueError for what cannot be with, or has no meaning without, parallel.diloco.every."""
    diloco, every = config.parallel.diloco, config.parallel.diloco.every
    if not every:
        if diloco != DilocoConfig():
            key = differences(diloco, DilocoConfig(), "parallel.diloco.")[0]
            raise ValueError(f"{key} has no meaning without --parallel.diloco.every")
        return
    if grid.replicas < 2:
        raise ValueError(
            f"parallel.diloco.every {every} is for replicas that train on their own, and there is one; start more "
            "processes, or give --parallel.replicas"
        )
    for key in ("eval_every", "checkpoint_every"):
        value = getattr(config.train, key)
        if value % every:
            raise ValueError(
                f"train.{key} {value} is no multiple of parallel.diloco.every {every}: only there do the replicas have "
                f"weights in common; take {-(-value // every) * every}"
            )
    _, rule = find_method(config.method or "").form(config.optim.frames)
    if diloco.cap is not None and rule not in BOUNDED:
        raise ValueError(
            f"parallel.diloco.cap {diloco.cap} counts in optim.lr, which of {config.method} is no bound on ||dW||_2"
        )
    for key, excluded in (("lr", 0), ("momentum", 1), ("cap", 0)):
        if getattr(diloco, key) == excluded:
            raise ValueError(f"parallel.diloco.{key} must not be {excluded}")


def notes(config: RunConfig, steps: int) -> list[str]:
    """What a person should know before a run of so many steps: an outer momentum that is long for it."""
    d = config.parallel.diloco
    if not d.every or d.momentum <= BETTER_IN_SHORT_RUNS or round(steps / d.every * (1 - d.momentum), 9) >= 10:
        return []
    meetings, memory = math.ceil(steps / d.every), round(1 / (1 - d.momentum), 1)
    return [
        f"this run has {meetings} meetings of replicas, few for parallel.diloco.momentum {d.momentum}, which remembers "
        f"{memory:g}: in runs this short {BETTER_IN_SHORT_RUNS} was better (docs/log.md)"
    ]


def outer_of(config: RunConfig, built: Built, grid: Grid) -> Outer | None:
    """The outer optimizer, if there is one; called by all processes."""
    d = config.parallel.diloco
    if not d.every:
        return None
    return Outer(built.model, built.optimizer, grid, d.every, d.lr, d.momentum, d.nesterov, d.cap)


def replicas_apart(outer: Outer | None) -> int:
    """How many optimizers a checkpoint holds: one, or one for each replica."""
    return 1 if outer is None else outer.grid.replicas


def check_taken_up(stored: dict[str, Any], outer: Outer | None, where: str) -> None:
    """Raises a ValueError for a checkpoint that another number of optimizers wrote."""
    there, here = stored["optimizers"], replicas_apart(outer)
    if there != here:
        raise ValueError(
            f"{where} holds {there} optimizers of replicas on their own, this run has {here}; it takes as many, and "
            "parallel.diloco.every as it was"
        )
