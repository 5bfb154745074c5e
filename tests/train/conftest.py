"""A look inside a run."""

import pytest


@pytest.fixture
def built(monkeypatch):
    """A list that gets the model and optimizer of every run that starts from now on."""
    from nativerank.train import loop

    made, build = [], loop.build

    def keep(*args):
        made.append(build(*args))
        return made[-1]

    monkeypatch.setattr(loop, "build", keep)
    return made
