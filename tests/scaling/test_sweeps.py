"""A sweep in its folder: nothing twice, slices and job arrays like one run, failures told, other sweeps refused."""

import json
from dataclasses import replace

import pytest

from nativerank.experiments import grid
from nativerank.experiments.arms import Arm
from nativerank.scaling import run as sweeps
from nativerank.scaling.cells import plan_cells
from nativerank.scaling.design import SWEEP, Design, read_sweep
from nativerank.scaling.run import run_sweep
from nativerank.scaling.sources import read_runs


@pytest.fixture
def design():
    arms = (Arm("dense-muon", "dense-muon"), Arm("thin", "spectron", {"rank.ratio": 0.25}))
    return Design(("pocket@32x1x2", "pocket@64x2x4"), (1e11, 3e11), arms, convention="exact")


@pytest.fixture
def fake(monkeypatch):
    """Stands in for training: a loss made of the steps; lists the sizes that ran; fails for those in `broken`."""
    ran, broken = [], set()

    def run(self, command, environment):
        settings = dict(zip(command[4::2], command[5::2], strict=False))
        size = settings["--model.preset"]
        ran.append(size)
        if size in broken:
            return 2, "", "nativerank: error: out of memory\n"
        summary = {"val_loss": 2 + 100 / int(settings["--train.steps"]), "bits_per_byte": 1.0, "step": 1}
        summary |= {"tokens": 1024 * int(settings["--train.steps"]), "seconds": 60.0, "peak_memory_bytes": 1}
        return 0, json.dumps(summary), ""

    monkeypatch.setattr(grid.Children, "run", run)
    monkeypatch.setattr(sweeps, "training_tokens", lambda source: 100_000)
    run.ran, run.broken = ran, broken
    return run


def go(design, folder, **options):
    said = []
    return run_sweep(design, plan_cells(design), folder, say=said.append, **options), said


def rows_of(folder):
    return sorted((folder / "runs.csv").read_text().splitlines())


def test_a_sweep_is_read_back_as_it_was_planned(design, fake, tmp_path):
    record, said = go(design, tmp_path / "s")
    assert (record["planned"], record["done"], record["failed"], record["left"]) == (8, 8, 0, 0)
    assert len(said) == 10 and said[0].startswith("8 runs, 1 at a time") and "pocket@32x1x2" in said[2]
    assert "data: 100,000 training tokens" in said[1] and "worth less than new ones" in said[1]
    runs, cells = read_runs([tmp_path / "s"]), plan_cells(design)
    for run, cell in zip(runs, cells, strict=True):
        assert (run.params, run.budget, run.lr) == (cell.params["total"], cell.budget, cell.lr)
        assert (run.flops, run.loss, run.rank_ratio) == (cell.flops["exact"], 2 + 100 / cell.steps, cell.rank_ratio)
    table = read_runs([tmp_path / "s" / "runs.csv"], "exact")
    assert [replace(run, source="") for run in table] == [replace(run, source="") for run in runs]
    body = read_runs([tmp_path / "s"], "6nd", "non_embedding")
    assert body[0].params == cells[0].params["non_embedding"] and body[0].flops == 6 * body[0].params * body[0].tokens


def test_nothing_runs_twice_and_more_may_join(design, fake, tmp_path):
    go(design, tmp_path)
    before = (tmp_path / "results.jsonl").read_text()
    fake.ran.clear()
    record, said = go(design, tmp_path)
    assert fake.ran == [] and record["done"] == 8 and said[0] == "8 runs, all done"
    assert (tmp_path / "results.jsonl").read_text() == before
    more = replace(design, sizes=("pocket@48x2x3",))
    go(more, tmp_path)
    assert set(fake.ran) == {"pocket@48x2x3"} and len(fake.ran) == 4
    assert len(read_sweep(tmp_path)["cells"]) == 12 and len(read_runs([tmp_path])) == 12


def test_tasks_of_a_job_array_give_the_sweep_of_one_process(design, fake, tmp_path):
    go(design, tmp_path / "one")
    for number in (7, 0, 3, 1, 2, 6, 5, 4, 3):
        record, _ = go(design, tmp_path / "many", only=number)
        assert record["planned"] == record["done"] == 1
    assert len(list((tmp_path / "many").glob("results-*.jsonl"))) == 8
    assert not (tmp_path / "many" / "results.jsonl").exists() and len(fake.ran) == 16
    assert read_runs([tmp_path / "many"]) == [
        replace(run, source=run.source.replace("one", "many")) for run in read_runs([tmp_path / "one"])
    ]
    go(design, tmp_path / "many")
    assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one") and len(fake.ran) == 16


def test_a_failed_cell_is_told_left_out_and_tried_again(design, fake, tmp_path):
    fake.broken.add("pocket@64x2x4")
    record, said = go(design, tmp_path)
    assert (record["done"], record["failed"]) == (4, 4) and sum("error: out of memory" in line for line in said) == 4
    complaints = []
    assert len(read_runs([tmp_path], complain=complaints.append)) == 4
    assert "of 8 cells 4 failed" in complaints[0]
    fake.broken.clear()
    fake.ran.clear()
    record, _ = go(design, tmp_path)
    assert record["done"] == 8 and fake.ran == ["pocket@64x2x4"] * 4


def test_other_folders_are_refused(design, fake, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no sweep"):
        go(design, tmp_path / "full")
    go(design, tmp_path / "s")
    with pytest.raises(ValueError, match=r"holds another sweep, which differs in convention, train.batch_size"):
        go(replace(design, convention="6nd", common={"train.batch_size": 4}), tmp_path / "s")
    with pytest.raises(ValueError, match=r"--cell is 0 to 7, .* got 8"):
        go(design, tmp_path / "s", only=8)
    (tmp_path / "s" / SWEEP).write_text('{"design": {}}')
    with pytest.raises(ValueError, match=r"cannot read .*sweep.json"):
        read_runs([tmp_path / "s"])


def test_a_sweep_without_results_says_how_to_go_on(design, tmp_path, fake):
    fake.broken |= set(design.sizes)
    go(design, tmp_path)
    with pytest.raises(ValueError, match=r"no cell of .* has ended; nativerank scaling run --out"):
        read_runs([tmp_path])
