"""Comparisons whose cells are not trained: a formula stands in for the processes."""

import json
import math
import re
from types import SimpleNamespace

import pytest

from nativerank.experiments import grid
from nativerank.experiments.arms import parse_arms, parse_values
from nativerank.experiments.request import Request, carry_out

OPTIMUM = {
    **{"spectron": 0.1, "lowrank-adamw": 0.003, "lowrank-muon": 0.03, "dense-adamw": 0.004, "dense-muon": 0.04},
    **{"sct": 0.02, "tsvd": 0.02, "stiefel-spectron": 0.05, "adam-muon": 0.02},
}


def parabola(settings):
    """A loss with its lowest point at OPTIMUM, a little higher for every seed, capped like a plateau."""
    away = math.log(settings["optim.lr"] / OPTIMUM[settings["method"]])
    away += 0.3 * math.log(settings["optim.aux_lr"] / 0.01)
    return 3.0 + min(0.1 * away**2, 2.0) + 0.01 * settings["train.seed"]


@pytest.fixture
def stand_in(monkeypatch):
    """What the cells answer: `loss` of their settings, a float, an error's text or Diverged; `ran` lists them."""
    state = SimpleNamespace(ran=[], loss=parabola, rows=lambda settings: [])

    def run(self, command, environment):
        words = command[command.index("train") + 1 :]
        settings = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=False)}
        for key, value in settings.items():
            if re.fullmatch(r"[-+.\de]+", value):
                settings[key] = float(value) if "." in value or "e" in value else int(value)
        state.ran.append(settings)
        answer = state.loss(settings)
        rows = state.rows(settings)
        if rows:
            folder = words[words.index("--out") + 1]
            (grid.Path(folder)).mkdir(parents=True, exist_ok=True)
            (grid.Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if isinstance(answer, tuple):
            return *answer[:1], "", f"nativerank: error: {answer[1]}\n"
        steps = settings["train.steps"]
        tokens = {"step": steps, "tokens": steps * 32, "seconds": 2.0, "peak_memory_bytes": 10**8}
        return 0, json.dumps({"val_loss": answer, "bits_per_byte": 1.0, **tokens}), ""

    monkeypatch.setattr(grid.Children, "run", run)
    return state


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
