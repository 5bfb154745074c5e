"""Comparisons whose cells are not trained: a formula stands in for the processes (`stand_in`)."""

import pytest

from nativerank.experiments.arms import parse_arms, parse_values
from nativerank.experiments.request import Request, carry_out


@pytest.fixture
def common(settings):
    """common(**changes): settings of tiny cells, as a request has them."""

    def make(**changes):
        return {"train.checkpoint_every": 0, **settings(**changes)}

    return make


@pytest.fixture
def ask(tmp_path, common):
    """ask(methods, **changes): carries out a request in tmp_path / out and returns its record."""

    def go(methods="spectron,lowrank-adamw", settings=None, **changes):
        options = {"grid": {"optim.lr": parse_values("--lrs", "0.05,0.1,0.2")}, "seeds": 2, **changes}
        cells = common(**{"optim__aux_lr": 0.01, **(settings or {})})
        return carry_out(Request(tmp_path / "out", cells, parse_arms(methods), **options), lambda line: None)

    return go
