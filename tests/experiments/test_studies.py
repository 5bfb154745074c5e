"""Every study's plan, and its findings from losses and norms that are known."""

import re
from pathlib import Path

import pytest

from nativerank.experiments import studies
from nativerank.experiments.compare import Comparison, Tries
from nativerank.experiments.expect import expected_seconds, rehearse
from nativerank.experiments.request import Request, carry_out
from nativerank.experiments.studies import (
    CAPPED,
    EQUAL_FLOPS,
    NESTEROV,
    PAPER,
    RANKS,
    STARTS,
    STUDIES,
    VARIANTS,
    WIDTH_METHODS,
    WIDTHS,
    find_study,
    width_label,
)
from nativerank.experiments.table import COLUMNS
from nativerank.train.guard import Diverged

MINUTES = {
    "ablation": (25, 60),
    "lr-robustness": (20, 45),
    "update-norm": (8, 20),
    "equal-flops": (12, 30),
    "adaptive-rank": (20, 60),
    "frames": (25, 60),
    "diloco": (5, 20),
}


@pytest.fixture
def pocket(prepared):
    """Settings of a study's cells: its own defaults on the tests' data."""

    def make(name, **changes):
        return {**STUDIES[name].defaults, "data.path": str(prepared), "train.checkpoint_every": 0, **changes}

    return make


@pytest.fixture
def study(tmp_path, pocket, stand_in):
    """study(name, seeds): its record, from cells that are not trained."""

    def go(name, seeds=1):
        request = Request(tmp_path / name, pocket(name), study=name, budget=STUDIES[name].budget, seeds=seeds)
        return carry_out(request, lambda line: None)

    return go


@pytest.mark.parametrize("name", STUDIES)
def test_the_plan(name, tmp_path, pocket):
    request = Request(
        tmp_path, pocket(name), study=name, budget=STUDIES[name].budget, seeds=STUDIES[name].seeds, jobs=2
    )
    cells = rehearse(request.run, Comparison(tmp_path, request.common, request.budget, request.seeds, 2))
    assert len({cell.name for _, cell in cells}) == len(cells)
    labels = {contender.arm.label for contender, _ in cells}
    assert len(labels) == len({id(contender) for contender, _ in cells}), "no two arms share a label"
    low, high = MINUTES[name]
    minutes = expected_seconds(cells, tmp_path, 2) / 60
    assert low <= minutes <= high, f"{len(cells)} cells"


def test_the_tests_minutes_name_every_study():
    assert set(MINUTES) == set(STUDIES)
    with pytest.raises(ValueError, match="unknown study 'ablatoin'; did you mean ablation"):
        find_study("ablatoin")


def ablation_loss(settings):
    """Without a part the loss is higher and the best rate elsewhere, far away for the raw momentum."""
    orthogonal, renormalized = settings.get("optim.orthogonalizer") != "none", "optim.renormalize" not in settings
    best = {(True, True): 0.08, (True, False): 0.03, (False, True): 100.0, (False, False): 0.5}[
        orthogonal, renormalized
    ]
    if settings["method"] == "lowrank-adamw":
        best, orthogonal = 0.005, False
    distance = settings["optim.lr"] / best
    lost = 0.2 * (not orthogonal) + 0.1 * (not renormalized)
    return 3.0 + lost + abs(distance - 1 / distance) * 0.01 + 1 / settings["rank.value"]


def test_ablation(study, stand_in):
    stand_in.loss = ablation_loss
    record = study("ablation")
    assert [arm["group"] for arm in record["arms"][:: len(VARIANTS)]] == list(RANKS.values())
    assert all(arm["edges"] == [] for arm in record["arms"])
    lost = record["study"]["numbers"]["32"]
    full, orthogonal, renormalized, neither, adamw = lost.values()
    assert full < orthogonal < renormalized < neither and adamw > full
    best = {arm["label"]: arm["best"]["optim.lr"] for arm in record["arms"]}
    for rank in RANKS:
        assert 50 <= best[f"renormalisation only, rank {rank}"] <= 200, "the search walked there"
    # At the other ranks it starts there: the best rate and its neighbours.
    for rank in list(RANKS)[1:]:
        assert sum(c["method"] == f"renormalisation only, rank {rank}" for c in record["cells"]) == 3


def robust_loss(settings):
    """Losses rise with the distance above the best rate: Spectron's slowly, Muon's until it diverges."""
    steep = {"spectron": 0.1, "lowrank-adamw": 0.4, "lowrank-muon": 0.8, "dense-adamw": 0.2}[settings["method"]]
    distance = settings["optim.lr"] / STARTS[settings["method"]]
    if settings["method"] == "lowrank-muon" and distance > 6:
        return Diverged.exit_code, "step 40: 6 spikes in a row"
    return 3.0 + steep * abs(distance - 1)


def test_robustness_and_transfer(study, stand_in, tmp_path):
    stand_in.loss = robust_loss
    record = study("lr-robustness")
    numbers = record["study"]["numbers"]
    assert numbers["loss_increase"]["spectron"]["4x"] == pytest.approx(0.3)
    assert numbers["loss_increase"]["lowrank-muon"]["8x"] is None
    ratio = numbers["ratio"][PAPER]
    assert ratio["lowrank-adamw"]["5x"] == pytest.approx(4) and "8x" not in ratio["lowrank-muon"]
    assert ratio["lowrank-muon"]["4x"] == pytest.approx(8) and set(ratio) == set(STARTS) - {PAPER, NESTEROV}
    assert numbers["ratio"][NESTEROV] == ratio
    assert numbers["best_rate_by_width"]["spectron"] == dict.fromkeys(WIDTHS, STARTS["spectron"])
    assert numbers["without_loss"]["lowrank-muon"] == {"8x": "diverged 1 of 1"}
    assert any("8x diverged 1 of 1" in line for line in record["study"]["lines"])
    wide = {cell["method"]: cell for cell in record["cells"]}
    labels = {width_label(method, width) for method in WIDTH_METHODS for width in WIDTHS}
    assert labels <= set(wide)
    configs = sorted(Path(c["model.config"]).name for c in stand_in.ran if "model.config" in c)
    assert set(configs) == {f"d{width}.json" for width in WIDTHS}
    assert {c["train.steps"] for c in stand_in.ran if "model.config" in c} == {300}
    params = {arm["label"]: arm["parameters"]["non_embedding"] for arm in record["arms"]}
    assert params[width_label("spectron", 256)] > 3.5 * params[width_label("spectron", 128)]


def pipes(table):
    """Column marks of each line of a Markdown table, escaped bars left out."""
    return {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line.startswith("|")}


@pytest.mark.parametrize("name", STUDIES)
def test_every_studys_table_has_its_columns(name, study, stand_in, tmp_path):
    stand_in.rows = norm_rows
    stand_in.loss = ablation_loss if name == "ablation" else stand_in.loss
    study(name)
    assert pipes((tmp_path / name / "table.md").read_text()) == {len(COLUMNS) + 1}


def test_the_tuned_rate_stays_where_the_search_ended(study, stand_in):
    """Seed 0 chooses the start; at twice the rate the other seeds are lower, so the mean is too."""

    def loss(settings):
        if settings["method"] != "spectron" or "model.config" in settings:
            return robust_loss(settings)
        distance = settings["optim.lr"] / STARTS["spectron"]
        twice = 0.9 if distance == 2 and settings["train.seed"] else 0.0
        return 3.0 + 0.1 * abs(distance - 1) - twice + 0.01 * settings["train.seed"]

    stand_in.loss = loss
    record = study("lr-robustness", seeds=3)
    spectron = next(arm for arm in record["arms"] if arm["label"] == "spectron")
    assert spectron["best"]["optim.lr"] == STARTS["spectron"]
    increases = record["study"]["numbers"]["loss_increase"]["spectron"]
    assert increases == pytest.approx({"0.5x": 0.05, "2x": 0.1 - 0.6, "4x": 0.3, "5x": 0.4, "8x": 0.7})
    assert record["study"]["numbers"]["without_loss"]["spectron"] == {}
    lines = record["study"]["lines"]
    assert "spectron ends lower at optim.lr 0.16 than where its search stopped: 2.510 against 3.010" in lines
    assert sum("ends lower" in line for line in lines) == 2, "with Nesterov it is the same"
    assert any(line.startswith("loss increase over the best rate 0.08 of spectron: 0.5x +0.050") for line in lines)


def test_a_multiple_without_a_loss_says_why(study, stand_in, monkeypatch):
    """Nobody averages over the seeds that came through, and nothing that did not run is called diverged."""
    monkeypatch.setattr(studies, "MULTIPLES", (2.0, 4.0, 8.0, 16.0))

    def loss(settings):
        distance = settings["optim.lr"] / STARTS[settings["method"]]
        if settings["method"] == "lowrank-adamw" and distance == 4 and settings["train.seed"] < 2:
            return Diverged.exit_code, "the loss is not finite"
        if settings["method"] == "lowrank-adamw" and distance == 8 and settings["train.seed"] == 1:
            return 1, "out of memory"
        return 3.0 + 0.1 * abs(distance - 1)

    stand_in.loss = loss
    record = study("lr-robustness", seeds=3)
    numbers, lines = record["study"]["numbers"], record["study"]["lines"]
    assert numbers["without_loss"]["lowrank-adamw"] == {"4x": "diverged 2 of 3", "8x": "failed 1 of 3"}
    assert numbers["loss_increase"]["lowrank-adamw"] == {"2x": pytest.approx(0.1), "4x": None, "8x": None, "16x": 1.5}
    assert numbers["without_loss"]["spectron"] == {"16x": "refused"}
    assert any("lowrank-adamw: 2x +0.100, 4x diverged 2 of 3, 8x failed 1 of 3, 16x +1.500" in line for line in lines)
    assert any(line.startswith("spectron at 16x was refused: spectron's optim.lr is a bound") for line in lines)
    assert not any(c["method"] == "spectron" and c["optim.lr"] > 1 for c in stand_in.ran)


def test_a_point_that_never_ran_is_not_diverged():
    tries = Tries()
    assert tries.lack({"optim.lr": 1.0}) == "not run"
    tries.add({"optim.lr": 1.0}, 0, {"error": "x"})
    assert tries.lack({"optim.lr": 1.0}) == "failed 1 of 1"


def norm_rows(settings):
    """A step of a size that follows the rate, one of them refused by the guard."""
    size = settings["optim.lr"] * {"spectron": 0.5, "lowrank-adamw": 40.0}.get(settings["method"], 5.0)
    probe = {"update_norm": size, "output_change": 2 * size, "sigma_W": 3 * size}
    rows = [{"step": 10 * k, "loss": 3.0, "tokens": k, "probes": {"o": probe}} for k in range(1, 11)]
    rows[4]["probes"] = {"o": {**probe, "update_norm": 0.0}}
    return rows


def rank_rows(settings):
    """A threshold takes half of the parameters and two of three ranks."""
    adaptive = "rank.adapt.threshold" in settings
    end = {
        "event": "end",
        "ranks": {"a": 4, "b": 8, "c": 32} if adaptive else {"a": 32, "b": 32, "c": 32},
        "parameters": {"total": 200, "non_embedding": 50 if adaptive else 100},
        "train_flops": 3e9 if adaptive else 4e9,
        "step": 10,
    }
    looks = [{"event": "ranks", "step": 3, "ranks": {name: [32, 8] for name in "ab"}}, {"event": "ranks", "step": 6}]
    looks[1]["ranks"] = {"a": [8, 4]}
    return [*(looks if adaptive else []), end]


def test_adaptive_ranks(study, stand_in):
    stand_in.rows = rank_rows
    stand_in.loss = lambda s: 3.0 + 0.1 * s.get("rank.adapt.threshold", 0) + 0.01 * s["train.seed"]
    record = study("adaptive-rank", seeds=2)
    label = "spectron[rank.adapt.threshold=0.95;rank.adapt.grow=0]"
    found = record["study"]["numbers"][label]
    assert found["against"]["mean"] == pytest.approx(0.095) and found["against"]["n"] == 2
    assert {k: found[k] for k in ("parameters", "train_flops", "changed", "smallest", "largest")} == pytest.approx(
        {"parameters": 50, "train_flops": 3e9, "changed": 2 / 3, "smallest": 4, "largest": 32}
    )
    line = next(line for line in record["study"]["lines"] if line.startswith(f"{label}: "))
    assert (
        "+0.095 nats, 0.50 of the parameters" in line and "0.75 of the FLOPs, 67% of the ranks changed, 4 to 32" in line
    )


def outer_rows(settings):
    """Two outer steps, the second one twice as long."""
    outer = [{"budget": 2.0, "update_norm": 1.0 * k, "factor_gap": 0.1 * k, "shortened": 0} for k in (1, 2)]
    rows = [{"step": k, "tokens": k, "loss": 3.0, "outer": o} for k, o in enumerate(outer, 1)]
    return rows if "parallel.diloco.every" in settings else rows[:0]


def test_replicas_that_meet_now_and_then(study, stand_in):
    stand_in.rows = outer_rows
    stand_in.loss = lambda s: 3.0 + 0.001 * s.get("parallel.diloco.every", 0) + 0.01 * s["parallel.replicas"]
    record = study("diloco")
    label = "spectron[parallel.replicas=4;parallel.shards=1;parallel.diloco.every=50;parallel.diloco.momentum=0.5]"
    found = record["study"]["numbers"][label]
    assert found["loss"] == pytest.approx(3.09) and found["against"]["mean"] == pytest.approx(0.05)
    assert found["step"] == pytest.approx(0.75) and found["gap"] == pytest.approx(0.1)
    line = next(line for line in record["study"]["lines"] if line.startswith(f"{label}: "))
    assert "+0.050 nats; outer steps move W by 0.75 of the inner rates' sum, factors' means lose 10.0% of that" in line
    assert len(record["study"]["numbers"]) == 2 * (5 + 1)
    assert {s["parallel.replicas"] for s in stand_in.ran} == {2, 4}


def test_update_norms(study, stand_in):
    stand_in.rows = norm_rows
    stand_in.loss = lambda s: 3.1 if "optim.update_cap" in s else robust_loss(s)
    record = study("update-norm")
    numbers, series = record["study"]["numbers"], record["study"]["series"]
    naive, spectron = STARTS["lowrank-adamw"], STARTS["spectron"]
    assert numbers["spectron"]["update_norm"] == pytest.approx(dict.fromkeys(("median", "p90", "max"), spectron * 0.5))
    assert set(numbers["median_ratio"]) == {f"{PAPER} at 5x", f"{NESTEROV} at 5x"}
    assert numbers["median_ratio"]["spectron at 5x"] == pytest.approx(8 * naive * 40 / (5 * spectron * 0.5))
    assert len(series["spectron at 5x"]["steps"]) == 9, "the refused step is no step"
    capped = [c for c in stand_in.ran if "optim.update_cap" in c]
    assert [(c["optim.update_cap"], c["optim.lr"]) for c in capped] == [(spectron, pytest.approx(8 * naive))]
    high = 3.0 + 0.4 * 7
    assert numbers["cap"]["recovered"] == pytest.approx((high - 3.1) / (high - 3.0))
    assert CAPPED in {arm["label"] for arm in record["arms"]}
    assert record["study"]["lines"][-2].startswith("lowrank-adamw: 3.000 at its best rate, 5.800 at 8x, 3.100 at 8x")


def test_a_diverged_extreme_of_update_norms_is_called_so(study, stand_in):
    stand_in.rows = norm_rows
    far = 8 * STARTS["lowrank-adamw"]
    stand_in.loss = lambda s: (Diverged.exit_code, "6 spikes") if s["optim.lr"] == pytest.approx(far) else 3.0
    record = study("update-norm")
    assert "recovered" not in record["study"]["numbers"]["cap"]
    line = "lowrank-adamw: 3.000 at its best rate, diverged 1 of 1 at 8x, diverged 1 of 1 at 8x with ||dW|| capped"
    assert line in record["study"]["lines"]
    assert any(line.startswith("lowrank-adamw at 8x (diverged 1 of 1), median") for line in record["study"]["lines"])


def test_equal_flops(study, stand_in):
    record = study("equal-flops", seeds=3)
    flops = [arm["flops"] for arm in record["arms"]]
    assert max(flops) / min(flops) < 1.005
    steps = {arm["label"]: arm["steps"] for arm in record["arms"]}
    assert [steps[m] for m in EQUAL_FLOPS[:4]] == [600] * 4 and 250 < steps["dense-adamw"] == steps["dense-muon"] < 600
    numbers = record["study"]["numbers"]
    means = {arm["label"]: arm["mean"] for arm in record["arms"]}
    assert numbers["low_rank"] == min(EQUAL_FLOPS[:4], key=means.get)
    assert numbers["dense"] == min(EQUAL_FLOPS[4:], key=means.get)
    assert numbers["difference"]["n"] == 3
    assert re.search(r"minus best dense .* 95% interval \[.*under-trained", record["study"]["lines"][0])


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_in_which_everything_fails_still_says_so(name, study, stand_in, tmp_path):
    stand_in.loss = lambda settings: (1, "out of memory")
    record = study(name)
    assert all(arm["mean"] is None for arm in record["arms"])
    assert "no run finished" in (tmp_path / name / "table.md").read_text()
