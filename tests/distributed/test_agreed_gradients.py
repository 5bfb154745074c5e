"""Processes that have gradients of different parameters hear so before the optimizer moves anything."""

import pytest
import torch
from torch import nn

from nativerank.distributed.agree import Agreed
from nativerank.distributed.gradients import MARKS, loss_and_norms, mark_of
from nativerank.distributed.grid import make_grid
from nativerank.distributed.wrap import wrap


class Branches(nn.Module):
    """A sum over the branches that take part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x, names):
        return sum(getattr(self, name)(x).square().mean() for name in names)


def one_pass(rank, shape, used, engine, frozen):
    """What a step says after a backward pass in which the processes used these branches: the error, or the norm."""
    grid, model = make_grid(*shape, "cpu"), Branches()
    model.c.requires_grad_(not frozen)
    forward, _ = wrap(model, grid, {}) if engine else (model, [])
    loss = forward(torch.full((4, 8), rank + 1.0), used[rank])
    loss.backward()
    try:
        return loss_and_norms(loss.detach(), forward.named_parameters(), grid, apart=not engine)[1]
    except Agreed as error:
        return str(error), error.silent


LACK = "rank {} has no gradient of {}.weight, which rank {} has; all processes must use the same parameters in a step"


@pytest.mark.parametrize(
    ("shape", "used", "engine", "said"),
    [
        ((2, 1), ("ab", "ac"), True, LACK.format(1, "b", 0)),  # each waits for a bucket of its own: none is averaged
        ((1, 2), ("ab", "ac"), True, LACK.format(1, "b", 0)),  # b's gradient is added to c's, for they are as large
        ((2, 1), ("abc", "a"), False, LACK.format(1, "b", 0)),
        ((3, 1), ("a", "a", "ab"), False, LACK.format(0, "b", 2)),
    ],
    ids=["ddp", "fsdp", "apart", "three"],
)
def test_a_gradient_that_one_process_lacks_is_named_by_all(forked, shape, used, engine, said):
    world = shape[0] * shape[1]
    assert forked(one_pass, world, shape, used, engine, False) == [(said, rank != 0) for rank in range(world)]


@pytest.mark.parametrize(
    ("shape", "used", "engine", "frozen"),
    [((1, 2), ("ab", "ab"), True, False), ((3, 1), ("a", "a", "a"), False, False), ((2, 1), ("ab", "ab"), True, True)],
    ids=["fsdp", "three", "frozen"],
)
def test_what_all_lack_is_no_difference(forked, shape, used, engine, frozen):
    for norms in forked(one_pass, shape[0] * shape[1], shape, used, engine, frozen):
        assert all(norm > 0 for norm in norms)


def test_marks_are_small_and_tell_lists_apart():
    lists = [[f"layers.{i}.up.weight", f"layers.{j}.down.weight"][: 1 + (j > 0)] for i in range(9) for j in range(9)]
    marks = [mark_of(names) for names in lists]
    assert mark_of([]) == 0 and all(0 < mark < MARKS for mark in marks) and len(set(marks)) == len(lists)
    assert 8192 * (MARKS - 1) ** 2 < 2**53
