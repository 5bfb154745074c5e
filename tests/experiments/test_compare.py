"""Comparisons: what is run, what is kept, and what is said about it."""

import json
import math

import pytest

from nativerank.experiments.arms import parse_arms, parse_values
from nativerank.experiments.compare import Comparison, Tries
from nativerank.experiments.expect import expected_seconds, rehearse
from nativerank.experiments.request import RECORD, REQUEST, TABLE, Request, carry_out
from nativerank.experiments.search import ALL_STAGES, parse_stages, search, tried_near
from nativerank.experiments.summary import edges
from nativerank.experiments.table import COLUMNS, render
from nativerank.train.guard import Diverged

LRS = {"optim.lr": parse_values("--lrs", "0.05,0.1,0.2")}


@pytest.fixture
def ask(tmp_path, common):
    """ask(methods, **changes): carries out a request in tmp_path / out and returns its record."""

    def go(methods="spectron,lowrank-adamw", settings=None, **changes):
        options = {"grid": LRS, "seeds": 2, **changes}
        cells = common(**{"optim__aux_lr": 0.01, **(settings or {})})
        return carry_out(Request(tmp_path / "out", cells, parse_arms(methods), **options), lambda line: None)

    return go


def entry(record, label):
    (found,) = [arm for arm in record["arms"] if arm["label"] == label]
    return found


def test_the_best_point_by_mean_and_the_difference_to_the_first(ask, stand_in, tmp_path):
    record = ask(
        "spectron,spectron[optim.momentum=0.9],dense-adamw", grid={"optim.lr": parse_values("--lrs", "0.1,0.2")}
    )
    assert len(stand_in.ran) == 3 * 2 * 2
    first = entry(record, "spectron")
    assert first["best"]["optim.lr"] == 0.1 and first["n"] == 2
    assert first["mean"] == pytest.approx(3.005) and first["sd"] == pytest.approx(0.01 / math.sqrt(2))
    assert first["perplexity"] == pytest.approx(math.exp(3.005)) and first["difference"] is None
    dense = entry(record, "dense-adamw")
    away = 0.1 * math.log(0.1 / 0.004) ** 2
    assert dense["difference"]["mean"] == pytest.approx(away) and dense["difference"]["n"] == 2
    assert dense["difference"]["low"] == pytest.approx(away) == pytest.approx(dense["difference"]["high"])
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == json.loads(json.dumps(record))


def test_cells_of_all_arms_share_seed_length_and_data(ask, stand_in):
    ask(seeds=2)
    for key in ("train.seed", "train.steps", "data.path", "train.context"):
        by_method = [{c[key] for c in stand_in.ran if c["method"] == m} for m in ("spectron", "lowrank-adamw")]
        assert by_method[0] == by_method[1]
    assert {c["train.seed"] for c in stand_in.ran} == {0, 1}


def test_names_of_cells_depend_on_settings_alone(tmp_path, common):
    """The same arm entered beside others, in another order and by another folder, is the same cell."""
    one, two = (Comparison(tmp_path / name, common()) for name in "ab")
    one.enter(parse_arms("spectron,dense-adamw[optim.eps=1e-9]"))
    two.enter(parse_arms("dense-adamw[optim.eps=1e-9],lowrank-muon,spectron"))
    point = {"optim.lr": 0.1, "optim.aux_lr": 0.01, "model.init_scale": 0.5}
    for label in one.contenders:
        cells = [comparison.contenders[label].cell(point, 1) for comparison in (one, two)]
        assert cells[0].name == cells[1].name
        assert cells[0].name != one.contenders[label].cell(point, 0).name
    assert (
        one.contenders["spectron"].cell(point, 0).name
        != one.contenders["dense-adamw[optim.eps=1e-9]"].cell(point, 0).name
    )


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_a_best_rate_at_the_edge_is_flagged(ask, stand_in, side, tmp_path):
    values = "0.1,0.2,0.4" if side == "lower" else "0.025,0.05,0.1"
    record = ask("spectron", grid={"optim.lr": parse_values("--lrs", values)}, seeds=1)
    assert entry(record, "spectron")["edges"] == [{"coordinate": "optim.lr", "side": side}]
    assert f"best optim.lr at the {side} edge" in (tmp_path / "out" / TABLE).read_text()
    inside = ask("spectron", grid={"optim.lr": parse_values("--lrs", "0.05,0.1,0.2")}, seeds=1)
    assert entry(inside, "spectron")["edges"] == []


def test_a_diverged_value_was_tried_and_a_refused_one_was_not():
    tries = Tries()
    tries.add({"optim.lr": 0.5}, 0, {"val_loss": 3.0})
    tries.add({"optim.lr": 0.2}, 0, {"val_loss": 3.2})
    tries.add({"optim.lr": 2.0}, 0, {"error": "must be at most 1"})
    assert edges(tries, {"optim.lr": 0.5}) == [{"coordinate": "optim.lr", "side": "upper"}]
    tries.add({"optim.lr": 1.0}, 0, {"diverged": "the loss is not finite"})
    assert edges(tries, {"optim.lr": 0.5}) == []


def test_a_seed_that_did_not_finish_counts_against_its_point():
    tries = Tries()
    for lr, losses in {0.1: (3.2, 3.4), 0.2: (3.0, None)}.items():
        for seed, loss in enumerate(losses):
            tries.add({"optim.lr": lr}, seed, {"diverged": "x"} if loss is None else {"val_loss": loss})
    assert tries.best() == {"optim.lr": 0.1}
    assert Tries().best() is None


def test_failing_and_diverging_cells_do_not_break_the_table(ask, stand_in, tmp_path):
    def loss(settings):
        if settings["method"] == "dense-adamw":
            return 1, "out of memory"
        if settings["optim.lr"] == 0.2:
            return Diverged.exit_code, "step 3: the loss is not finite"
        return float("nan") if settings["optim.lr"] == 0.05 else 3.0

    stand_in.loss = loss
    record = ask("spectron,dense-adamw", seeds=2)
    good, bad = record["arms"]
    assert (good["diverged"], good["failed"], good["n"], good["edges"]) == (4, 0, 2, [])
    assert (bad["n"], bad["mean"], bad["best"], bad["failed"]) == (0, None, None, 6)
    table = (tmp_path / "out" / TABLE).read_text()
    assert "| 4 of 6 |" in table and "no run finished" in table and "6 of 6 cells failed" in table
    rows = [line.count("|") for line in table.splitlines() if line.startswith("|")]
    assert set(rows) == {len(COLUMNS) + 1}
    assert "NaN" not in (tmp_path / "out" / RECORD).read_text()
    # A diverged run is a result; one that failed is tried again.
    stand_in.ran.clear()
    ask("spectron,dense-adamw", seeds=2)
    assert {c["method"] for c in stand_in.ran} == {"dense-adamw"} and len(stand_in.ran) == 6


def test_interrupted_comparisons_go_on_and_may_grow(ask, stand_in):
    def stop(settings):
        if len(stand_in.ran) > 4:
            raise KeyboardInterrupt
        return 3.0

    stand_in.loss, loss = stop, stand_in.loss
    with pytest.raises(KeyboardInterrupt):
        ask()
    stand_in.loss = loss
    before = len(stand_in.ran)
    ask()
    assert len(stand_in.ran) - before == 12 - 4
    stand_in.ran.clear()
    ask("spectron,lowrank-adamw,lowrank-muon", seeds=3)
    assert len(stand_in.ran) == 3 * 2 + 9, "one more seed of what was there, and the new arm"


def test_equal_flops_give_the_cheaper_arm_more_steps(ask, stand_in):
    record = ask("spectron,dense-adamw", settings={"train__steps": 200}, budget="flops", seeds=1)
    low, dense = record["arms"]
    assert (
        low["steps"] == 200 and dense["steps"] == round(200 * low["flops_per_token"] / dense["flops_per_token"]) < 200
    )
    assert dense["flops"] == pytest.approx(low["flops"], rel=0.5 / dense["steps"])
    assert {c["method"]: c["train.steps"] for c in stand_in.ran} == {"spectron": 200, "dense-adamw": dense["steps"]}


def test_equal_tokens_are_equal_steps_and_a_guide_costs_flops(ask, stand_in):
    stand_in.loss = lambda settings: 3.0
    record = ask("spectron,self-guided,self-guided[guide.stochastic=false]", seeds=1)
    steps, flops = ([arm[key] for arm in record["arms"]] for key in ("steps", "flops"))
    assert len(set(steps)) == 1 and flops == sorted(flops) and len(set(flops)) == 3
    # The guide is gone at the end: the parameters are those of the factors.
    assert len({arm["parameters"]["total"] for arm in record["arms"]}) == 1


def test_tuning_treats_every_arm_alike_and_ends_inside(ask, stand_in):
    record = ask("spectron,dense-adamw", grid={}, stages=parse_stages(ALL_STAGES), seeds=3)
    for arm in record["arms"]:
        assert arm["edges"] == [] and arm["n"] == 3
        tried = {cell["optim.lr"] for cell in record["cells"] if cell["method"] == arm["label"]}
        assert min(tried) < arm["best"]["optim.lr"] < max(tried)
    spectron = entry(record, "spectron")["best"]
    # The formula's valley: lr (aux_lr)^0.3 is all that counts, and init_scale does not.
    assert abs(math.log(spectron["optim.lr"] / 0.1) + 0.3 * math.log(spectron["optim.aux_lr"] / 0.01)) < math.log(1.6)
    assert spectron["model.init_scale"] == 3**-0.5
    seeds = [cell["seed"] for cell in record["cells"] if cell["method"] == "spectron"]
    assert seeds.count(1) == seeds.count(2) == 1 and seeds.count(0) >= 7


def test_a_search_keeps_to_its_grid(ask, stand_in):
    """From 0.05 down to 0.0312 and back: 0.0499 is 0.05, which has run."""
    stand_in.loss = lambda s: 3 + 0.1 * abs(math.log(s["optim.lr"] / 0.0312)) + 0.01 * s["train.seed"]
    record = ask("spectron[optim.lr=0.05]", grid={}, stages=parse_stages("lr"), seeds=1)
    assert [c["optim.lr"] for c in stand_in.ran] == [0.05, 0.0312, 0.08, 0.0195]
    assert entry(record, "spectron[optim.lr=0.05]")["best"]["optim.lr"] == 0.0312
    assert tried_near(0.0499, [0.05, 0.0495, 0.08]) == 0.05 and tried_near(0.052, [0.05]) == 0.052


def test_a_coordinate_near_another_points_is_not_it(tmp_path, common, stand_in):
    """What was tried at another auxiliary rate does not stand for a value here."""
    comparison = Comparison(tmp_path, common(**{"optim__aux_lr": 0.01}), say=lambda line: None)
    labels = comparison.enter(parse_arms("spectron[optim.lr=0.05]"))
    other = {**comparison.contenders[labels[0]].start, "optim.lr": 0.0315, "optim.aux_lr": 0.5}
    comparison.run([(labels[0], other, 0)])
    search(comparison, labels, parse_stages("lr"))
    assert 0.0312 not in {c["optim.lr"] for c in stand_in.ran if c["optim.aux_lr"] == 0.01}, "it started from the best"
    assert {c["optim.lr"] for c in stand_in.ran if c["optim.aux_lr"] == 0.5} >= {0.0315, 0.0504}


def test_what_training_refuses_is_refused_before_anything_runs(ask, stand_in, tmp_path):
    for methods, grid in (
        ("spectron[optim.lr=2]", {}),
        ("lowrank-adamw,spectron", {"optim.lr": parse_values("--lrs", "0.1,2")}),
        ("lowrank-adamw,spectron[optim.lr=0.5]", {"optim.lr": parse_values("--lrs", "1x,4x")}),
    ):
        with pytest.raises(ValueError, match=r"^spectron.*: spectron's optim\.lr is a bound .* at most 1 .* got 2"):
            ask(methods, grid=grid)
    for settings, said in (
        ({"train__context": 4096}, "train.context 4096 exceeds"),
        ({"train__probe": ["nothing"]}, "train.probe"),
    ):
        with pytest.raises(ValueError, match=said):
            ask("spectron", settings=settings)
    assert stand_in.ran == [] and not (tmp_path / "out").exists()
    # The certified form may take it, and AdamW too.
    ask("spectron[optim.certified=true],lowrank-adamw", grid={"optim.lr": parse_values("--lrs", "2")}, seeds=1)
    assert len(stand_in.ran) == 2


def test_a_search_stops_at_a_refused_rate(ask, stand_in):
    stand_in.loss = lambda s: 3 - s["optim.lr"]
    record = ask("spectron[optim.lr=0.5]", grid={}, stages=parse_stages("lr"), seeds=1)
    (arm,) = record["arms"]
    assert max(c["optim.lr"] for c in stand_in.ran) == 0.8 == arm["best"]["optim.lr"]
    assert (arm["refused"], arm["failed"]) == (1, 0)
    assert arm["edges"] == [{"coordinate": "optim.lr", "side": "upper"}]


def test_guided_arms_may_have_no_guided_step(ask, stand_in):
    stand_in.loss = lambda settings: 3.0
    ask("self-guided[guide.share=0]", seeds=1)
    assert len(stand_in.ran) == 3


def test_steps_that_the_guard_refused_are_told(ask, stand_in, tmp_path):
    """From the cell's record, also where a row was written before rows had the number."""

    def rows(settings):
        spike = {"event": "loss_spike", "action": "skip"} if settings["optim.lr"] == 0.2 else {}
        start = {"event": "start", "step": 0, "environment": {"commit": "abc", "machine": "x, 2 cores, 3 threads"}}
        return [start, {"step": 1, "loss": 3.0, "tokens": 1, **spike}, {"step": 2, "loss": 3.0, "tokens": 2, **spike}]

    stand_in.rows = rows
    record = ask("spectron", seeds=2)
    results = tmp_path / "out" / "results.jsonl"
    before = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["settings"]["optim.lr"]: row["refused_steps"] for row in before} == {0.05: 0, 0.1: 0, 0.2: 2}
    old = [{key: row[key] for key in row if key not in ("refused_steps", "commit", "threads")} for row in before]
    results.write_text("".join(json.dumps(row) + "\n" for row in old))
    again = ask("spectron", seeds=2)
    for found in (record, again):
        assert found["arms"][0]["refused_steps"] == [2, 2] and found["arms"][0]["refused_steps_at_best"] == 0
    assert len(record["commits"]) == 1 and again["commits"] == {"abc": 6} and again["cell_threads"] == [3]
    table = (tmp_path / "out" / TABLE).read_text()
    assert "4 steps refused in 2 of 6 cells |" in table and ", 3 threads per run" in table
    stand_in.loss = lambda s: 3.0 - s["optim.lr"]
    results.unlink()
    ask("spectron", seeds=1)
    assert "2 steps refused in 1 of 3 cells, 2 at the best point |" in (tmp_path / "out" / TABLE).read_text()


def test_cells_of_several_commits_are_told_apart(ask, stand_in, tmp_path):
    ask("spectron", seeds=1)
    results = tmp_path / "out" / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert "several commits" not in (tmp_path / "out" / TABLE).read_text()
    results.write_text("".join(json.dumps({**row, "commit": "f" * 40}) + "\n" for row in rows[:1] + rows[2:]))
    record = ask("spectron", seeds=1)
    assert record["commits"]["f" * 40] == 2 and len(record["commits"]) == 2
    said = f"The cells ran at several commits: {'f' * 12} (2 cells), {rows[1]['commit'][:12]} (1 cell)."
    assert said in (tmp_path / "out" / TABLE).read_text()


def test_a_cell_of_two_arms_is_told_as_the_first_ones(ask, stand_in, tmp_path):
    grid = {"optim.lr": parse_values("--lrs", "1x,2x")}
    record = ask("spectron[optim.lr=0.1],spectron[optim.lr=0.2]", grid=grid, seeds=1)
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["settings"]["optim.lr"]: row["arm"] for row in rows} == {
        **dict.fromkeys((0.1, 0.2), "spectron[optim.lr=0.1]"),
        0.4: "spectron[optim.lr=0.2]",
    }
    assert [arm["cells"] for arm in record["arms"]] == [2, 2]


def test_the_record_reads_like_a_committed_sweep(ask, stand_in):
    """`best` and `cells` are what benchmarks/results/sweep-*.json hold and tests/test_rates.py checks."""
    record = ask("spectron", grid={}, stages=parse_stages("lr"), seeds=2)
    point = record["best"]["spectron"]
    cells = [cell for cell in record["cells"] if cell["method"] == "spectron" and cell["seed"] == 0]
    (at_best,) = [cell["val_loss"] for cell in cells if all(cell[key] == point[key] for key in point)]
    assert at_best == min(cell["val_loss"] for cell in cells)


def test_the_curve_is_that_of_the_best_point(ask, stand_in):
    def rows(settings):
        steps = [{"step": n, "tokens": 32 * n, "loss": settings["optim.lr"] + 4 - n / 400} for n in range(1, 401)]
        steps[99]["val_loss"], steps[199]["val_loss"] = "nan", 3.5  # what is not finite is kept as a text
        end = {"event": "end", "step": 400, "tokens": 12800, "val_loss": 3.0}
        return [{"event": "start", "step": 0}, *steps, end]

    stand_in.rows = rows
    record = ask("spectron", seeds=1)
    curve = record["curves"]["spectron"]
    assert len(curve["train"]) <= 60 and curve["train"][-1][0] == 12800
    assert curve["train"][0] == [7 * 32, pytest.approx(0.1 + 4 - 4 / 400)]
    assert curve["validation"] == [[6400, 3.5], [12800, 3.0]]
    assert curve["flops_per_token"] == record["arms"][0]["flops_per_token"]


def test_the_rehearsal_names_the_cells_of_a_product(tmp_path, common):
    request = Request(tmp_path / "out", common(), parse_arms("spectron,dense-adamw"), LRS, seeds=2)
    comparison = Comparison(request.folder, request.common, seeds=2, jobs=2)
    cells = rehearse(request.run, comparison)
    assert len(cells) == 12 and not comparison.contenders and not request.folder.exists()
    assert expected_seconds(cells, request.folder, 2) == pytest.approx(12 * 8 / 2, rel=0.1), "tiny: overhead alone"


def test_expected_time_follows_what_ran(ask, stand_in, tmp_path, common):
    ask(seeds=1)
    request = Request(tmp_path / "out", common(optim__aux_lr=0.01), parse_arms("spectron,lowrank-adamw"), LRS, seeds=2)
    cells = rehearse(request.run, Comparison(request.folder, request.common, seeds=2))
    assert expected_seconds(cells, request.folder, 1) == pytest.approx(6 * (2.0 + 4.0)), "six are done, 2 s a run"


@pytest.mark.parametrize("change", [{"settings": {"train__steps": 9}}, {"budget": "flops"}])
def test_a_folder_holds_one_comparison(ask, stand_in, change):
    ask(seeds=1)
    with pytest.raises(ValueError, match=r"holds another comparison, which differs in (train.steps|budget); choose"):
        ask(seeds=1, **change)


def test_a_folder_is_claimed_before_anything_is_written(ask, stand_in, tmp_path, monkeypatch):
    """A kill in the rehearsal, where a study writes model configs, leaves a folder that the same command takes up."""

    def killed(program, comparison):
        (comparison.folder / "configs").mkdir()
        (comparison.folder / "configs" / "d64.json").write_text("{}")
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr("nativerank.experiments.request.rehearse", killed)
        patch.setattr("nativerank.experiments.request.undoing", lambda folder: lambda: None)  # kill -9 runs no handler
        with pytest.raises(SystemExit):
            ask(seeds=1)
    ask(seeds=1)
    assert len(stand_in.ran) == 6


def test_a_folder_with_a_killed_writers_leftover_is_free(ask, stand_in, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{REQUEST}.partial").write_text("{")
    ask(seeds=1)
    assert len(stand_in.ran) == 6


def test_what_failed_before_it_began_takes_away_only_its_own(ask, stand_in, tmp_path):
    bad = {"grid": {"optim.lr": parse_values("--lrs", "2")}}
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="at most 1"):
        ask("spectron", **bad)
    assert list((tmp_path / "out").iterdir()) == []
    ask("spectron", seeds=1)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="at most 1"):
        ask("spectron", **bad)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before and REQUEST in before


def test_a_folder_with_other_things_is_left_alone(ask, stand_in, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="is not empty and holds no comparison"):
        ask()
    assert stand_in.ran == []
    (tmp_path / "out" / REQUEST).write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*request.json"):
        ask()


@pytest.mark.parametrize(
    ("methods", "changes", "said"),
    [
        ("dense-adamw[rank.value=4]", {}, r"dense-adamw\[rank.value=4\]: dense-adamw keeps dense matrices"),
        ("spectron,spectron[train.steps=3]", {"budget": "flops"}, "sets train.steps, which --budget flops decides"),
        ("spectron[optim.lr=0.1]", {}, "sets optim.lr itself, so its values must be multiples"),
    ],
)
def test_arms_that_cannot_be_leave_nothing_behind(ask, stand_in, tmp_path, methods, changes, said):
    with pytest.raises(ValueError, match=said):
        ask(methods, **changes)
    assert stand_in.ran == [] and not (tmp_path / "out").exists()


def test_an_arm_with_its_own_rate_takes_multiples_of_it(ask, stand_in):
    ask("spectron[optim.lr=0.3]", grid={"optim.lr": parse_values("--lrs", "0.5x,1x")}, seeds=1)
    assert [c["optim.lr"] for c in stand_in.ran] == [0.15, 0.3]


def test_the_table_ranks_by_mean_within_groups(ask, stand_in):
    record = ask("lowrank-adamw,spectron", seeds=1)
    lines = [line.split(" | ") for line in render(record).splitlines() if line.startswith("| ")]
    assert [words[1] for words in lines[1:]] == ["`spectron`", "`lowrank-adamw`"]
    assert lines[2][13] == "reference" and lines[1][13].startswith("-")
    record["arms"][1]["group"] = "second"
    text = render(record, ["a finding"])
    assert "## second" in text and "- a finding" in text and "Nobody tried several values of optim.aux_lr" in text
