"""Every test of this room has a cache of its own and a little English."""

import random

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NATIVERANK_CACHE", str(tmp_path_factory.mktemp("cache")))


WORDS = (
    "the of and to in a low rank matrix model learns language from text while every token is read once or twice "
    "gradient descent moves factors that hold weights thin and tall under spectral norm bounds 1790 2026 cafe naive"
).split()


@pytest.fixture
def paragraphs():
    """paragraphs(n, seed): n distinct paragraphs of some hundred bytes."""

    def make(count, seed=0):
        source = random.Random(seed)
        return [" ".join(source.choices(WORDS, k=source.randint(40, 120))) + f" {i}." for i in range(count)]

    return make
