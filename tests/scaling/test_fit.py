"""The whole record: its shape, what it warns of, what it leaves out, and that a program can read it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from nativerank.scaling.fit import fit
from nativerank.scaling.parametric import Parametric
from nativerank.scaling.rates import best_rates
from nativerank.scaling.sources import read_runs
from nativerank.scaling.sweep import Options

FEW = Options(samples=100)


def test_a_table_of_a_known_law_gives_its_constants(sweep, chinchilla, tmp_path):
    file = tmp_path / "sweep.csv"
    rows = [f"{run.params!r},{run.tokens!r},{run.flops!r},{run.loss!r}" for run in sweep()]
    file.write_text("\n".join(["params,tokens,flops,loss", *rows]), encoding="utf-8")
    found = fit(read_runs([file]), FEW)
    group = found["groups"]["all"]
    assert found["isoflop"]["n_exponent"] == pytest.approx(chinchilla.n_exponent, abs=0.01)
    assert found["isoflop"]["d_exponent"] == pytest.approx(chinchilla.d_exponent, abs=0.01)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert found["parametric"][name] == pytest.approx(getattr(chinchilla, name), rel=1e-4)
    assert found["warnings"] == group["warnings"] == [] and group["runs"] == 36 and found["surface"] is None


def test_the_record_is_strict_json_whose_intervals_hold_the_estimates(sweep):
    found = fit(sweep(noise=2e-3), FEW)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    iso, par = found["isoflop"], found["parametric"]
    for key in ("n", "d"):
        for record in (iso, par):
            low, high = record[f"{key}_interval"]
            assert low < record[f"{key}_exponent"] < high
    for name, (low, high) in par["intervals"].items():
        assert low < par[name] < high
    for profile in iso["profiles"]:
        low, high = profile["params_interval"]
        assert low < profile["params"] < high


def test_curves_go_through_the_estimates(sweep):
    found = fit(sweep(noise=1e-3), FEW)
    iso, curves = found["isoflop"], found["groups"]["all"]["curves"]
    curve = curves["isoflop"]["params"]
    assert curve["flops"][-1] == pytest.approx(1e26)
    expected = iso["n_coefficient"] * np.array(curve["flops"]) ** iso["n_exponent"]
    np.testing.assert_allclose(curve["best"], expected)
    widths = [math.log(high / low) for low, high in curve["band"]]
    assert widths[-1] > widths[0]  # it knows less the further it looks
    assert len(curves["isoflop"]["profiles"]) == 4 and len(curves["runs"]) == 36


def test_two_fits_of_the_same_runs_agree_to_the_bit(sweep):
    runs = sweep(noise=2e-3)
    assert fit(runs, FEW) == fit(runs, FEW)


def test_budgets_are_predicted_from_the_others(sweep):
    clean, noisy = (fit(sweep(noise=noise), FEW) for noise in (0.0, 5e-3))
    for record, key in (("isoflop", "log_params_error"), ("parametric", "log_loss_error")):
        errors = [max(abs(row[key]) for row in found[record]["prediction"]) for found in (clean, noisy)]
        assert errors[0] < 1e-3 < errors[1]


def test_a_minimum_is_predicted_by_the_line_through_the_others(sweep):
    record = fit(sweep(noise=5e-3), FEW)["isoflop"]
    x, y = (np.log([profile[key] for profile in record["profiles"]]) for key in ("flops", "params"))
    for k, row in enumerate(record["prediction"]):
        line = np.polyfit(np.delete(x, k), np.delete(y, k), 1)
        assert row["log_params_error"] == pytest.approx(np.polyval(line, x[k]) - y[k])


def test_a_bend_shows_in_prediction(sweep):
    """The largest budget 3% worse than the law: the others predict it 3% too low."""
    runs = [replace(run, loss=run.loss * (1.03 if run.flops > 3e19 else 1)) for run in sweep()]
    rows = fit(runs, FEW)["parametric"]["prediction"]
    assert rows[-1]["log_loss_error"] == pytest.approx(math.log(1.03), rel=0.01)


def test_a_diverged_cell_is_left_out_and_named(sweep, chinchilla):
    runs = sweep(noise=2e-4)
    runs[3] = replace(runs[3], loss=math.inf, source="runs/a")
    runs[12] = replace(runs[12], loss=1.5 * runs[12].loss, source="sweep.csv, row 14")
    found = fit(runs, FEW)
    group = found["groups"]["all"]
    assert [row["source"] for row in group["left_out"]] == ["runs/a", "sweep.csv, row 14"]
    assert group["warnings"][0] == "runs/a is left out: it diverged"
    assert "row 14 is left out: its loss lies far above" in group["warnings"][1]
    assert found["isoflop"]["n_exponent"] == pytest.approx(chinchilla.n_exponent, abs=0.01)


def test_a_budget_without_a_minimum_takes_no_part(sweep, chinchilla):
    runs = sweep(budgets=(2e18, 6e18, 2e19)) + sweep(shift=3.0, budgets=(6e19,)) + sweep(sizes=2, budgets=(2e20,))
    found = fit(runs, FEW)
    faults = [profile["fault"] for profile in found["isoflop"]["profiles"]]
    assert faults[:3] == [None] * 3 and "outside the grid" in faults[3] and "fewer than 3 sizes" in faults[4]
    assert [
        w
        for w in found["groups"]["all"]["warnings"]
        if w.startswith("6e+19 FLOPs take no part in the power laws: the minimum")
    ]
    assert found["isoflop"]["n_exponent"] == pytest.approx(chinchilla.n_exponent, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": (2e18, 6e18)}, "go through two budgets"),
        ({"sizes": 4}, "has 4 sizes, too few to resample: IsoFLOP intervals are Student's"),
        ({"sizes": 3}, "3 runs a budget leave no scatter"),
        ({"noise": 0.03, "sizes": 5, "budgets": (2e18, 3e18, 5e18)}, "is not determined by these runs"),
    ],
)
def test_what_is_not_known_is_said(sweep, options, message):
    found = fit(sweep(**options), FEW)
    assert [w for w in found["groups"]["all"]["warnings"] if message in w]
    if options.get("sizes") == 3:
        assert found["isoflop"]["n_interval"] is None


def test_one_approach_alone_asks_less(sweep):
    runs = sweep(budgets=(1e18,))
    with pytest.raises(ValueError, match="need 2 budgets"):
        fit(runs, replace(FEW, approaches=("isoflop",)))
    assert fit(runs, replace(FEW, approaches=("parametric",)))["isoflop"] is None
    few = sweep(sizes=3, budgets=(1e18, 3e18))[:5]
    with pytest.raises(ValueError, match="needs 6 runs, got 5"):
        fit(few, replace(FEW, approaches=("parametric",)))


def test_without_a_word_what_suffices_is_fitted_and_the_rest_is_a_warning(sweep):
    found = fit(sweep(budgets=(1e18,)), FEW)
    assert found["isoflop"] is None and found["parametric"]["E"] == pytest.approx(1.817, rel=1e-3)
    assert any("need 2 budgets" in line for line in found["groups"]["all"]["warnings"])
    few = [replace(run, method="b") for run in sweep(sizes=2)]
    found = fit([*(replace(run, method="a") for run in sweep()), *few], FEW)
    assert list(found["groups"]) == ["a", "b"] and found["groups"]["b"]["isoflop"] is None
    with pytest.raises(ValueError, match=r"needs 6 runs, got 4; .*need 2 budgets"):
        fit(few[:4], FEW)


def test_the_best_rate_of_a_cell_counts_and_an_edge_is_a_warning(sweep):
    """Of three rates the middle one has the law's loss; the others only cost."""
    clean = [replace(run, lr=0.02) for run in sweep()]
    worse = [replace(run, lr=lr, loss=run.loss * 1.02) for run in clean for lr in (0.01, 0.04)]
    found = fit(clean + worse, FEW)
    assert found["parametric"]["alpha"] == pytest.approx(0.348, rel=1e-3)
    assert found["groups"]["all"]["runs"] == len(clean) and not found["warnings"]
    edge = fit(clean + [run for run in worse if run.lr == 0.04], FEW)
    assert f"{len(clean)} of {len(clean)} cells are best at the lowest or highest rate" in edge["warnings"][0]


def test_seeds_are_replicates_and_decide_together_on_the_rate(sweep):
    runs = [replace(run, lr=lr, seed=seed) for run in sweep() for lr in (0.01, 0.02, 0.04) for seed in (0, 1)]
    # 0.01 has the lowest single loss, 0.02 the lowest mean.
    factor = {(0.01, 0): 0.99, (0.01, 1): 1.03, (0.02, 0): 1.0, (0.02, 1): 1.0, (0.04, 0): 1.1, (0.04, 1): 0.9}
    kept, warnings = best_rates([replace(run, loss=run.loss * factor[run.lr, run.seed]) for run in runs])
    assert {run.lr for run in kept} == {0.02} and len(kept) == 2 * len(sweep()) and not warnings
    lost = [replace(run, loss=math.inf) if (run.lr, run.seed) == (0.02, 1) else run for run in runs]
    assert {run.lr for run in best_rates(lost)[0]} == {0.01}


def test_methods_are_fitted_apart_and_ratios_together(sweep):
    dense = [replace(run, method="dense-adamw") for run in sweep(Parametric(1.7, 400.0, 2085.0, 0.33, 0.366))]
    thin = [
        replace(run, method="spectron", rank_ratio=rho, loss=run.loss * (1 + 0.01 * math.log(rho / 0.3) ** 2))
        for rho in (0.125, 0.25, 0.5)
        for run in sweep(sizes=5)
    ]
    found = fit(dense + thin, FEW)
    assert list(found["groups"]) == ["dense-adamw", "spectron rho=0.125", "spectron rho=0.25", "spectron rho=0.5"]
    assert found["groups"]["dense-adamw"]["parametric"]["E"] == pytest.approx(1.7, rel=1e-3)
    assert list(found["surface"]) == ["spectron"]
    best = found["surface"]["spectron"]["best"]
    assert len(best) == 4 and all(0.25 < row["rank_ratio"] < 0.35 and row["inside"] for row in best)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    alone = fit(thin, replace(FEW, approaches=("surface",)))
    assert alone["surface"] == found["surface"]


def test_wrong_input_is_one_clear_line(sweep):
    with pytest.raises(ValueError, match="no runs"):
        fit([])
    with pytest.raises(ValueError, match="a loss of nan cannot be fitted"):
        fit([replace(sweep()[0], loss=math.nan)])
    with pytest.raises(ValueError, match="approaches are isoflop and parametric and surface, got both"):
        Options(approaches=("both",))
    with pytest.raises(ValueError, match="10 resamples"):
        Options(samples=1)
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 95"):
        Options(level=95)
    with pytest.raises(ValueError, match="the law with rank needs a method that ran with 3 rank ratios"):
        fit(sweep(), replace(FEW, approaches=("surface",)))
    runs = [replace(run, method="a") for run in sweep()] + [replace(run, method="b") for run in sweep()[:4]]
    with pytest.raises(ValueError, match="b: the parametric law has 5 constants"):
        fit(runs, replace(FEW, approaches=("parametric",)))


def test_losses_that_follow_no_law_are_an_error(sweep):
    """Made with the fall of the loss in N turned round: no constants of a law are given for it."""
    runs = [replace(run, loss=2 + 1e-3 * run.params**0.3 + 100 * run.tokens**-0.3) for run in sweep()]
    with pytest.raises(ValueError, match="the losses do not fall with params as the law says: it would need alpha ="):
        fit(runs, replace(FEW, approaches=("parametric",)))


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_losses_it_is_strict_json_or_one_clear_error(sweep, seed):
    rng = np.random.default_rng(seed)
    runs = sweep(sizes=int(rng.integers(3, 7)), shift=float(rng.normal()), budgets=np.geomspace(1e13, 1e15, 3))
    noise = 10 ** rng.uniform(-3, 0) * rng.standard_cauchy(len(runs))
    runs = [replace(run, loss=float(run.loss * np.exp(np.clip(z, -3, 3)))) for run, z in zip(runs, noise, strict=True)]
    for approach in ("isoflop", "parametric"):
        try:
            text = json.dumps(fit(runs, Options(samples=30, approaches=(approach,))), allow_nan=False)
        except ValueError as error:
            assert "JSON" not in str(error) and "\n" not in str(error) and len(str(error)) > 20
        else:
            assert json.loads(text)[approach]
