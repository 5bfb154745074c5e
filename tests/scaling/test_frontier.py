"""Decisions by the laws of a sweep: algebra against brute force, the paper's arithmetic, break-even, bad questions."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from nativerank.scaling.decide import decide
from nativerank.scaling.fit import fit
from nativerank.scaling.frontier import Side, best_model, break_even, cheapest, paper_saving, saving
from nativerank.scaling.parametric import Parametric
from nativerank.scaling.sweep import Options

FEW = Options(samples=60)
DENSE = Parametric(1.8, 480.0, 2085.0, 0.348, 0.366)
THIN = Parametric(1.8, 400.0, 2085.0, 0.352, 0.366)  # fewer parameters do as well


@pytest.fixture
def found(sweep):
    """The fit of two groups without noise."""

    def make(dense=DENSE, thin=THIN, noise=0.0):
        runs = [replace(run, method="dense-muon") for run in sweep(dense, noise)]
        runs += [replace(run, method="spectron", rank_ratio=0.25) for run in sweep(thin, noise, seed=1)]
        return fit(runs, FEW)

    return make


def sides(found):
    return [Side(name, found["groups"][name]) for name in ("dense-muon", "spectron rho=0.25")]


def test_the_best_model_is_that_of_the_law(found):
    for side, law in zip(sides(found()), (DENSE, THIN), strict=True):
        for flops in (2e18, 1e21):
            best = best_model(side, flops)
            brute = minimize_scalar(
                lambda n, law=law, flops=flops: float(law.loss(np.exp(n), flops / 6 / np.exp(n))), bounds=(10, 30)
            )
            assert best["params"] == pytest.approx(float(np.exp(brute.x)), rel=0.03)
            assert best["loss"] == pytest.approx(brute.fun, rel=1e-4)
            assert best["params"] * best["tokens"] * 6 == pytest.approx(flops, rel=0.01)
            assert best["forward_flops_per_token"] == pytest.approx(2 * best["params"], rel=1e-6)


def test_intervals_hold_the_estimate_and_widen_far_away(found):
    dense, thin = sides(found(noise=3e-3))
    widths = []
    for flops in (1e19, 1e22, 1e26):
        best, (band,) = saving(dense, thin, np.array([flops]))
        assert band[0] <= best[0] <= band[1]
        widths.append(band[1] - band[0])
        low, high = best_model(thin, flops)["params_interval"]
        assert low <= best_model(thin, flops)["params"] <= high
    assert widths[0] < widths[1] < widths[2]


def test_equal_sides_save_nothing_and_never_break_even_differently(found):
    dense, thin = sides(found(thin=DENSE))
    best, _ = saving(dense, thin, np.geomspace(1e18, 1e26, 5))
    assert np.abs(best).max() < 1e-6
    loss = best_model(dense, 1e19)["loss"]
    a, b = (cheapest(side, loss, 1e10) for side in (dense, thin))
    assert a["total_flops"] == pytest.approx(b["total_flops"], rel=1e-4)


@pytest.mark.parametrize("served", [0.0, 1e9, 1e11, 1e13])
def test_the_cheapest_model_is_the_cheapest(found, served):
    """Against a minimisation in N by scipy, training at 6 N D and serving at 2 N."""
    dense, _ = sides(found())
    loss = float(DENSE.loss(2e8, 4e9))

    def cost(n):
        rest = loss - DENSE.E - DENSE.A * np.exp(-DENSE.alpha * n)
        if rest <= 0:
            return 1e60
        return float(6 * np.exp(n) * (DENSE.B / rest) ** (1 / DENSE.beta) + 2 * np.exp(n) * served)

    smallest = float(np.log(DENSE.A / (loss - DENSE.E)) / DENSE.alpha)
    brute = minimize_scalar(cost, bounds=(smallest + 1e-6, smallest + 12), method="bounded", options={"xatol": 1e-10})
    got = cheapest(dense, loss, served)
    assert got["total_flops"] == pytest.approx(brute.fun, rel=2e-3)  # the law is fitted, not given
    assert got["train_flops"] + got["serve_flops"] == pytest.approx(got["total_flops"])
    assert got["serve_flops"] == pytest.approx(2 * got["params"] * served, rel=1e-6)
    assert float(DENSE.loss(got["params"], got["tokens"])) == pytest.approx(loss, rel=1e-4)


def test_the_more_is_served_the_smaller_the_model(found):
    dense, _ = sides(found())
    loss = best_model(dense, 1e19)["loss"]
    sizes = [cheapest(dense, loss, served)["params"] for served in (0.0, 1e9, 1e10, 1e11, 1e12)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]


def test_break_even_is_where_the_costs_cross(found):
    """The low-rank side needs more tokens for the loss, but fewer parameters: dearer to train, cheaper to serve."""
    dense, thin = sides(found(thin=Parametric(1.8, 380.0, 4000.0, 0.352, 0.366)))
    loss = best_model(dense, 1e19)["loss"]
    even = break_even(dense, thin, loss)
    assert (even["before"], even["after"]) == ("dense", "lowrank")
    costs = [cheapest(side, loss, even["tokens"])["total_flops"] for side in (dense, thin)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)
    for factor, cheaper in ((0.5, 0), (2.0, 1)):
        costs = [cheapest(side, loss, factor * even["tokens"])["total_flops"] for side in (dense, thin)]
        assert costs[cheaper] < costs[1 - cheaper]
    swapped = break_even(thin, dense, loss)
    assert (swapped["before"], swapped["after"]) == ("lowrank", "dense")
    assert swapped["tokens"] == pytest.approx(even["tokens"])
    always = break_even(*sides(found()), loss)
    assert always == {"tokens": None, "before": "lowrank", "after": "lowrank", "again": []}


def test_sides_that_change_places_twice_are_told_so():
    """A law with a sharp corner: more tokens for any size, a larger smallest model, and the best of both between."""

    def side(law):
        runs = [{"params": n, "tokens": 1e10, "flops": 6e10 * n, "budget": 1e19} for n in (1e8, 3e8, 1e9)]
        return Side("side", {"parametric": law.as_dict(), "isoflop": None, "curves": {"runs": runs}})

    dense, thin = side(DENSE), side(Parametric(1.8, 5.9e13, 4610.0, 1.7163, 0.366))
    even = break_even(dense, thin, 2.6)
    assert (even["before"], even["after"], len(even["again"])) == ("dense", "lowrank", 1)
    for served, cheaper in ((0.0, 0), (2 * even["tokens"], 1), (even["again"][0] / 2, 1), (2 * even["again"][0], 0)):
        costs = [cheapest(s, 2.6, served)["total_flops"] for s in (dense, thin)]
        assert costs[cheaper] < costs[1 - cheaper]


def test_the_papers_half_is_arithmetic():
    paper = paper_saving(np.array([1.0, 1e26]))
    assert paper["saving"][0] == 0 and paper["saving"][1] == paper["at_last"]
    assert paper["at_last"] == pytest.approx(0.482, abs=1e-3)
    assert paper["at_last_if_meeting_at_2.2e18"] == pytest.approx(0.176, abs=1e-3)
    assert 1 - (1e26 / paper["half_if_meeting_at"]) ** (0.479 - 0.49) == pytest.approx(0.5)


def test_a_report_is_strict_json_that_answers(found):
    fitted = found(noise=2e-3)
    record = decide(fitted, 1e21, inference=1e12)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["dense"], record["lowrank"]) == ("dense-muon", "spectron rho=0.25")
    assert record["saving"]["curve"]["flops"][-1] == pytest.approx(1e26)
    assert record["serving"]["served"] == 1e12 and record["serving"]["lowrank"]["total_flops"] > 0
    assert any("1.4 decades above the runs" in line for line in record["warnings"])
    named = decide(fitted, dense="spectron rho=0.25", lowrank="dense-muon")
    assert named["saving"]["at_budget"] == pytest.approx(1 - 1 / (1 - decide(fitted)["saving"]["at_budget"]))


def test_the_group_with_the_lowest_loss_stands_for_its_kind(sweep):
    runs = [replace(run, method="dense-muon") for run in sweep(DENSE)]
    for ratio, law in ((0.125, DENSE), (0.25, THIN), (0.5, DENSE)):
        runs += [replace(run, method="spectron", rank_ratio=ratio) for run in sweep(law)]
    record = decide(fit(runs, FEW), 1e19)
    assert record["lowrank"] == "spectron rho=0.25"
    assert 0.2 < record["best_ratio"]["spectron"]["rank_ratio"] < 0.3


def test_one_group_is_reported_alone(sweep):
    record = decide(fit(sweep(), FEW))
    assert record["lowrank"] is None and record["saving"] is None and record["serving"]["lowrank"] is None
    assert record["groups"]["all"]["params"] > 0


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"budget": -1.0}, "--budget must be a finite number above 0, got -1"),
        ({"inference": float("nan")}, "--inference must be a finite number"),
        ({"loss": 1.0}, "a loss of 1 is not above E = 1.8"),
        ({"dense": "dense-muon", "lowrank": "dense-muon"}, "name one group, 'dense-muon'"),
        (
            {"dense": "denseadam"},
            r"--dense: the fit has no group 'denseadam' \(groups: dense-muon, spectron",
        ),
    ],
)
def test_bad_questions_are_one_clear_line(found, question, message):
    with pytest.raises(ValueError, match=message):
        decide(found(), **question)


@pytest.mark.parametrize(("loss", "said"), [(2.2, "times the largest budget"), (4.0, "of the smallest budget")])
def test_a_loss_beyond_the_runs_is_warned_of(found, loss, said):
    lines = decide(found(), loss=loss)["warnings"]
    assert [line.split(":")[0] for line in lines if said in line] == ["dense-muon", "spectron rho=0.25"]


def test_low_rank_alone_needs_the_loss_to_reach(sweep):
    fitted = fit([replace(run, method="spectron", rank_ratio=0.25) for run in sweep()], FEW)
    with pytest.raises(ValueError, match="without a dense group --inference needs --loss"):
        decide(fitted, inference=1e9)
    assert decide(fitted, inference=1e9, loss=2.8)["serving"]["lowrank"]["serve_flops"] > 0


def test_without_a_parametric_law_serving_cannot_be_asked(sweep):
    runs = [replace(run, method="dense-muon") for run in sweep(DENSE)]
    fitted = fit(runs, replace(FEW, approaches=("isoflop",)))
    record = decide(fitted)
    assert record["serving"] is None and any("has no parametric law" in line for line in record["warnings"])
    with pytest.raises(ValueError, match="has no parametric law"):
        decide(fitted, inference=1e9)
