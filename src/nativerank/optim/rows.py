"""Units whose rows are spread over processes, stacked by shape, and their update rules in the middle of a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nativerank.distributed.pieces import bounds
from nativerank.linalg.gram import full_precision
from nativerank.optim.ask import Answer, Ask, Asking, Part
from nativerank.optim.directions import State
from nativerank.optim.gram_rules import GRAM_RULES
from nativerank.optim.rules import RULES
from nativerank.optim.stacks import Begun, Bucket, begin, finish, put_rows, rows_of
from nativerank.optim.units import Unit


@dataclass
class Rows:
    """Units of equal shapes: their row shards as a bucket, and the small state of those that are solved here.

    Units stand in the order of their owners. `mine` are the places of those that are solved here; `small` has a dict
    per side, a row per place in `mine`.
    """

    units: list[Unit]
    bucket: Bucket
    mine: list[int]
    small: list[State]


@dataclass
class Running:
    """A gram rule that has asked."""

    rows: Rows
    begun: Begun
    rule: Asking
    ask: Ask
    options: dict[str, Any]

    def counts(self, world: int) -> list[int]:
        """How many of the active members each process solves, one after the other."""
        found = [0] * world
        for i in self.rows.bucket.active:
            found[self.rows.units[i].owner] += 1
        return found

    def solve(self, totals: Mapping[str, Tensor]) -> Mapping[str, Part]:
        """The answer for the members (m, ...) that are solved here, maybe none; their small state moves on."""
        active = set(self.rows.bucket.active)
        places = [row for row, i in enumerate(self.rows.mine) if i in active]
        among = None if len(places) == len(self.rows.mine) else torch.tensor(places, dtype=torch.long)
        small = rows_of(self.rows.small, among)
        assert self.ask.solve is not None
        with full_precision(self.device):
            answer = self.ask.solve(totals, small, self.options)
        put_rows(self.rows.small, small, among)
        return answer

    def go_on(self, answer: Answer) -> None:
        """To the next ask."""
        with full_precision(self.device):
            self.ask = self.rule.send(answer)

    def end(self, answer: Answer) -> None:
        """To the end of the step."""
        try:
            self.go_on(answer)
        except StopIteration as done:
            finish(self.rows.bucket, self.begun, done.value, self.options)
        else:
            raise AssertionError("a gram rule asks once for what is solved")

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.bucket.sides[0][0].device


def start(rows: Rows, options: dict[str, Any], index: int, count: int) -> Running | None:
    """Begins a step; None where no unit has its gradients.

    Args:
        rows: with present weights and gradients in its seats.
        options: of the group.
        index, count: this process among those that hold the same rows, which share the work of summing them.
    """
    begun = begin(rows.bucket, RULES[options["rule"]].width > 1)
    if begun is None:
        return None
    rule = GRAM_RULES[options["rule"]](*begun.stacks, options, partial(share, index=index, count=count))
    with full_precision(rows.bucket.sides[0][0].device):
        return Running(rows, begun, rule, next(rule), options)


def share(X: Tensor, index: int, count: int) -> Tensor:
    """The part of the rows of X (n, d_local, ...) that one of `count` holders of them sums."""
    return X.narrow(1, *bounds(X.shape[1], count, index))
