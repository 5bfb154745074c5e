"""AdamW's direction in one pass of torch's kernel is the formula's, whichever way the matrices lie."""

import pytest
import torch

from nativerank.optim import directions
from nativerank.optim.directions import Stack, adamw_direction


def steps(n, flat, dtype, count=4):
    """Directions and state of some steps of a stack of n tall views (8, 5), of matrices that lie flat or tall."""
    shape = (n, 5, 8) if flat else (n, 8, 5)
    state = {name: torch.zeros(shape, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
    state = {name: x.mT if flat else x for name, x in state.items()} | {"step": torch.arange(float(n))}
    generator = torch.Generator().manual_seed(0)
    found = [
        adamw_direction(
            Stack(torch.randn(n, 8, 5, generator=generator, dtype=dtype), state, ()),
            {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8},
        )
        for _ in range(count)
    ]
    return found, state


@pytest.mark.parametrize("flat", [False, True], ids=["tall", "flat"])
@pytest.mark.parametrize("n", [1, 3])
def test_one_pass_is_the_formula(n, flat, monkeypatch):
    quick, quick_state = steps(n, flat, torch.float64)
    monkeypatch.setattr(directions, "in_one_pass", lambda *arguments: None)
    plain, plain_state = steps(n, flat, torch.float64)
    torch.testing.assert_close(quick, plain)
    torch.testing.assert_close(quick_state, plain_state)


def test_matrices_that_lie_neither_way_take_the_formula():
    m = torch.zeros(2, 8, 10)[..., ::2]
    assert directions.in_one_pass(m, m, m, torch.ones(2), {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8}) is None
