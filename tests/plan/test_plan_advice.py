"""What a plan says of low rank agrees with the figures above it."""

from types import SimpleNamespace

import pytest

from nativerank.accounting.hardware import DEVICES
from nativerank.layers.report import FactorizeEntry, FactorizeReport
from nativerank.plan.advice import verdict

SUBJECT = SimpleNamespace(dense=False, width=lambda: 256, sequences=8, tokens_per_step=2048)


def plan_at(ratio, outside=0.6, updates=0.2):
    token = {"exact": 60.0, "forward": 10.0, "of_forward": {"attention": 0.0, "head": 10 * outside}}
    dense = {"time": {"seconds_per_step": 1.0, "optimizer_share": 0.01}, "flops": {"per_token": {"exact": 100.0}}}
    own = {
        "time": {"seconds_per_step": ratio, "optimizer_share": updates},
        "flops": {"per_token": token, "optimizer_over_exact": 0.1, "optimizer_per_step": 1000.0},
    }
    return own if ratio is None else {**own, "dense": dense}


def report_of(rank=64):
    size = rank * 512
    return FactorizeReport((FactorizeEntry("q_proj", "Linear", 256, 256, rank, 1, 256**2, size),), 2 * size, size)


@pytest.mark.parametrize("outside", [0.1, 0.6])
@pytest.mark.parametrize("rank", [16, 200])
@pytest.mark.parametrize(("ratio", "said"), [(0.62, None), (0.91, "pays_little"), (1.0, "will_not_pay")])
def test_only_time_and_break_even_say_that_it_will_not_pay(ratio, rank, outside, said):
    found = verdict(SUBJECT, report_of(rank), plan_at(ratio, outside), DEVICES["rtx-3090"])
    assert bool(found["will_not_pay"]) == (said == "will_not_pay")
    assert bool(found["pays_little"]) == (said == "pays_little")
    everything = [sentence for kind in found.values() for sentence in kind]
    assert len(set(everything)) == len(everything)
    for words, there in (("attention and head", outside > 0.5), ("break-even", rank == 200), ("optimizer is", True)):
        assert sum(words in sentence for sentence in everything) == there


def test_what_is_saved_stands_in_the_sentence():
    found = verdict(SUBJECT, report_of(), plan_at(0.91), DEVICES["rtx-3090"])
    assert "a step is 9% shorter than its twin's, with 0.60 of the twin's exact FLOPs" in found["pays_little"][0]


@pytest.mark.parametrize(
    ("outside", "updates", "why"),
    [
        (0.6, 0.5, "attention and head are 60%"),
        (0.1, 0.5, "without the optimizers' updates it would take 0.63"),
        (0.1, 0.02, "width 256 and passes of 8 sequences are too small for it"),
    ],
)
def test_the_reason_is_the_one_that_a_step_has(outside, updates, why):
    found = verdict(SUBJECT, report_of(), plan_at(1.24, outside, updates), DEVICES["h200"])
    assert why in found["will_not_pay"][0]


def test_without_a_twin_break_even_alone_says_so():
    found = verdict(SUBJECT, report_of(200), plan_at(None), DEVICES["h200"])
    assert len(found["will_not_pay"]) == 1 and "break-even" in found["will_not_pay"][0]
    assert not verdict(SUBJECT, None, plan_at(None), DEVICES["h200"])["will_not_pay"]


def test_a_dense_run_is_told_nothing():
    dense = SimpleNamespace(**{**vars(SUBJECT), "dense": True})
    assert not any(verdict(dense, None, plan_at(None), DEVICES["h200"]).values())
