"""Verdicts follow from intervals alone, and weaken as evidence does."""

import math

import pytest

from nativerank.experiments.statistics import Interval
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, below, not_above


def d(mean, half):
    return Interval(3, mean, mean - half, mean + half)


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([d(-0.10, 0.02), d(-0.08, 0.02)], REPRODUCED),
        ([d(-0.10, 0.02), d(-0.01, 0.02)], DIRECTION),
        ([d(-0.01, 0.02), d(-0.01, 0.02)], NOT),
        ([d(-0.10, 0.02), d(0.05, 0.02)], NOT),
        ([d(0.10, 0.02), d(0.05, 0.02)], NOT),
        ([Interval(1, -0.1, None, None)], UNTESTABLE),
        ([], UNTESTABLE),
    ],
)
def test_below(differences, word):
    assert below({str(i): x for i, x in enumerate(differences)}).word == word


def test_a_smaller_effect_than_the_published_one_is_only_the_direction():
    found = {"150 steps": d(-0.02, 0.005)}
    assert below(found).word == REPRODUCED
    assert below(found, (0.06, 0.12)).word == DIRECTION
    assert below({"150 steps": d(math.log(1 - 0.09), 0.01)}, (0.06, 0.12)).word == REPRODUCED
    assert below({"150 steps": d(math.log(1 - 0.30), 0.01)}, (0.06, 0.12)).word == REPRODUCED  # more than claimed


def test_a_larger_interval_never_strengthens_a_verdict():
    strength = [NOT, DIRECTION, REPRODUCED]
    for mean in (-0.2, -0.05, 0.0, 0.05):
        words = [strength.index(below({"a": d(mean, half), "b": d(-0.3, 0.01)}).word) for half in (0.01, 0.06, 0.3)]
        if mean < 0:
            assert words == sorted(words, reverse=True)


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([d(-0.1, 0.02)], REPRODUCED),
        ([d(0.0, 0.005)], REPRODUCED),
        ([d(0.0, 0.05)], DIRECTION),
        ([d(0.03, 0.05)], NOT),
        ([d(0.05, 0.02)], NOT),
        ([d(-0.1, 0.02), d(0.05, 0.02)], NOT),
    ],
)
def test_not_above(differences, word):
    assert not_above({str(i): x for i, x in enumerate(differences)}, 0.01).word == word


def test_why_has_the_numbers():
    why = below({"150 steps": d(-0.105, 0.02)}).why
    assert "150 steps" in why and "-0.105" in why and "[-0.125, -0.085]" in why and "-10.0%" in why
