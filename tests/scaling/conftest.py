"""Sweeps made from known laws."""

import numpy as np
import pytest

from nativerank.scaling.parametric import Parametric
from nativerank.scaling.records import Run

BUDGETS = (2.20e18, 5.57e18, 1.41e19, 3.57e19)  # the Spectron paper's


@pytest.fixture
def chinchilla():
    """The constants that Besiroglu et al. (2024) found in Chinchilla's runs."""
    return Parametric(1.817, 482.0, 2085.0, 0.348, 0.366)


@pytest.fixture
def sweep(chinchilla):
    """A function that makes runs at 6 N D around each budget's best size."""

    def make(law=None, noise=0.0, sizes=9, seed=0, shift=0.0, budgets=BUDGETS):
        law, rng = law or chinchilla, np.random.default_rng(seed)
        runs = []
        for flops in budgets:
            grid = law.best_params(flops) * np.exp(shift + np.linspace(-1.4, 1.4, sizes))
            for params in map(float, grid):
                tokens = flops / 6 / params
                loss = float(law.loss(params, tokens) * np.exp(noise * rng.standard_normal()))
                runs.append(Run(params, tokens, flops, loss, budget=flops))
        return runs

    return make
