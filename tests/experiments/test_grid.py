"""A grid computes nothing twice, and one bad cell does not stop the others."""

import json
import sys
import time
from types import SimpleNamespace

import pytest

from nativerank.experiments import grid
from nativerank.experiments.grid import Cell, run_grid
from nativerank.experiments.results import RESULTS, finished
from nativerank.train.setup import versions

CELLS = [Cell.of(method="spectron", optim__lr=lr) for lr in (0.01, 0.02, 0.03)]


@pytest.fixture
def fake(monkeypatch):
    """Stands in for the processes: answers with a loss, fails for the rates in `broken`; lists what was run."""
    state = SimpleNamespace(ran=[], broken=set(), stdout=None)

    def run(self, command, environment):
        lr = float(command[command.index("--optim.lr") + 1])
        state.ran.append(lr)
        state.command, state.environment = command, environment
        if lr in state.broken:
            return 2, "", "noise\nnativerank: error: it broke\n"
        summary = dict(val_loss=lr, bits_per_byte=1.0, step=8, tokens=256, seconds=0.1, peak_memory_bytes=1)
        return 0, state.stdout or json.dumps(summary), ""

    monkeypatch.setattr(grid.Children, "run", run)
    return state


def test_a_failed_cell_is_reported_and_stops_nothing(tmp_path, fake):
    fake.broken, said = {0.02}, []
    rows = run_grid(CELLS, tmp_path, say=said.append)
    assert [row.get("val_loss") for row in rows] == [0.01, None, 0.03]
    assert rows[1]["error"] == "it broke"
    assert sum("error: it broke" in line for line in said) == 1 and len(said) == 3
    assert said[-1].startswith("[3/3] ")


def test_a_cell_of_many_processes_is_started_by_torchrun_and_shares_its_threads(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    cell = Cell.of(method="spectron", optim__lr=0.01, parallel__replicas=2, parallel__shards=None)
    run_grid([cell], tmp_path, say=lambda line: None)
    assert fake.command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert fake.command[6:9] == ["-m", "nativerank", "train"] and fake.environment["OMP_NUM_THREADS"] == "2"
    assert Cell.of(parallel__replicas=2, parallel__shards=3).processes == 6 and CELLS[0].processes == 1


@pytest.mark.parametrize(("code", "key"), [(2, "error"), (3, "diverged")])
def test_what_torchrun_says_about_an_error_is_left_aside(tmp_path, monkeypatch, code, key):
    said = f"nativerank: error: it broke\nRoot Cause:\n  rank      : 0\n  exitcode  : {code} (pid: 7)\n=====\n"
    monkeypatch.setattr(grid.Children, "run", lambda self, command, environment: (1, "", said))
    (row,) = run_grid([Cell.of(method="spectron", parallel__replicas=2)], tmp_path, say=lambda line: None)
    assert row[key] == "it broke" and ("error" in row) == (key == "error")


def test_output_that_is_no_json_is_a_failed_cell(tmp_path, fake):
    fake.stdout = "Segmentation fault"
    rows = run_grid(CELLS[:1], tmp_path, say=lambda line: None)
    assert "no JSON but 'Segmentation fault'" in rows[0]["error"]


def test_finished_cells_are_not_computed_again_and_failed_ones_are(tmp_path, fake):
    fake.broken = {0.02}
    run_grid(CELLS, tmp_path, say=lambda line: None)
    fake.broken, fake.ran = set(), []
    rows = run_grid([*CELLS, Cell.of(method="spectron", optim__lr=0.04)], tmp_path, say=lambda line: None)
    assert sorted(fake.ran) == [0.02, 0.04]
    assert [row["val_loss"] for row in rows] == [0.01, 0.02, 0.03, 0.04]


@pytest.mark.parametrize("keep", [1, 25, -1])
def test_a_torn_last_line_costs_that_cell_only(tmp_path, fake, keep):
    run_grid(CELLS[:2], tmp_path, say=lambda line: None)
    first, second = (tmp_path / RESULTS).read_text().splitlines()
    (tmp_path / RESULTS).write_text(f"{first}\n{second[:keep]}")
    fake.ran = []
    run_grid(CELLS[:2], tmp_path, say=lambda line: None)
    torn = json.loads(second)["settings"]["optim.lr"]
    assert fake.ran == [torn]
    # What was appended after the torn line can be read too.
    assert len(finished(tmp_path)) == 2
    fake.ran = []
    run_grid(CELLS[:2], tmp_path, say=lambda line: None)
    assert fake.ran == []


def test_duplicates_run_once_and_names_depend_on_settings_alone(tmp_path, fake):
    same = Cell.of(optim__lr=0.01, method="spectron")
    assert same == CELLS[0] and same.name == CELLS[0].name and len({c.name for c in CELLS}) == 3
    rows = run_grid([CELLS[0], same], tmp_path, say=lambda line: None)
    assert fake.ran == [0.01] and len(rows) == 1


@pytest.mark.parametrize(("given", "share"), [(None, 2), ("12", 3), ("2", 1), ("8,4", 2), ("", 2)])
def test_threads_are_those_given_or_the_cores_one_may_use(tmp_path, fake, monkeypatch, given, share):
    monkeypatch.setattr(grid.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(grid.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
    (row,) = run_grid(CELLS[:1], tmp_path, jobs=4, say=lambda line: None)
    assert fake.environment["OMP_NUM_THREADS"] == str(share) and row["threads"] == share


def test_without_affinities_the_machines_cores_count(monkeypatch):
    monkeypatch.setattr(grid.os, "cpu_count", lambda: 64)
    monkeypatch.delattr(grid.os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert grid.threads_per_cell(4) == 16 and grid.threads_per_cell(100) == 1


def test_a_cell_is_a_resumable_run(tmp_path, fake):
    (row,) = run_grid(CELLS[:1], tmp_path, jobs=4, say=lambda line: None)
    words = fake.command[3:]
    assert words[0] == "train" and words[words.index("--resume") + 1] == "auto"
    assert words[words.index("--out") + 1] == str(tmp_path / "cells" / CELLS[0].name)
    assert row["commit"] == versions()["commit"]


def test_flags_are_what_train_reads():
    from nativerank.cli.train import parse

    cell = Cell.of(compile=True, optim__lr=0.5, rank__exclude=["down_proj"], model__preset="pocket")
    config, _ = parse(cell.flags())
    assert config.compile and config.optim.lr == 0.5
    assert config.rank.exclude == ["down_proj"] and config.model.preset == "pocket"


def test_a_real_cell(tmp_path, settings, cli, monkeypatch):
    """The real command line behind a cell, in this process: a good row, and an error's one line."""

    def run(self, command, environment):
        assert command[1:3] == ["-m", "nativerank"]
        result = cli(*command[3:])
        return result.code, result.out, result.err

    monkeypatch.setattr(grid.Children, "run", run)
    good, bad = (Cell(tuple(sorted(settings(train__steps=2, rank__value=r).items()))) for r in (4, 99))
    rows = run_grid([bad, good], tmp_path, say=lambda line: None)
    assert rows[0]["error"].startswith("rank of model.layers.0.self_attn.q_proj must be")
    assert rows[1]["step"] == 2 and rows[1]["val_loss"] > 0 and rows[1]["cell"] == good.name
    assert rows[1]["refused_steps"] == 0
    assert (tmp_path / "cells" / good.name / "model").is_dir()
    assert not (tmp_path / "cells" / bad.name).exists()


SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
open(sys.argv[1], "w").close()
time.sleep(60)
"""


def test_an_interrupt_ends_what_runs_and_starts_no_more(tmp_path, monkeypatch):
    """The first cell ends by itself; the interrupt comes while its row is taken and the second one runs."""
    run, codes = grid.Children.run, []
    started = tmp_path / "started"

    def stand_in(self, command, environment):
        if command[command.index("--optim.lr") + 1] == "0.01":
            while not started.exists():
                time.sleep(0.01)
            return 2, "", "it broke"
        code, *texts = run(self, [sys.executable, "-c", SLEEPER, str(started)], environment)
        codes.append(code)
        return code, *texts

    def interrupt(line):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid.Children, "run", stand_in)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_grid([*CELLS, *(Cell.of(optim__lr=lr) for lr in (0.04, 0.05, 0.06))], tmp_path, jobs=2, say=interrupt)
    assert time.monotonic() - began < 30 and len(codes) <= 2
    assert 143 in codes and set(codes) <= {143, -15}, "one was there to hear it, a second one perhaps not yet"


def test_results_of_others_count_and_a_result_outweighs_a_failure(tmp_path, fake):
    run_grid(CELLS[:1], tmp_path, say=lambda line: None, results="results-a.jsonl")
    fake.broken = {0.02}
    run_grid(CELLS[1:2], tmp_path, say=lambda line: None, results="results-b.jsonl")
    fake.broken = set()
    run_grid(CELLS[1:2], tmp_path, say=lambda line: None, results="results-a.jsonl")
    assert not (tmp_path / RESULTS).exists() and len(finished(tmp_path)) == 2
    fake.ran = []
    rows = run_grid(CELLS, tmp_path, say=lambda line: None)
    assert fake.ran == [0.03] and [row["val_loss"] for row in rows] == [0.01, 0.02, 0.03]


def test_after_the_minutes_cells_are_stopped_and_go_on_next_time(tmp_path, monkeypatch):
    """Cells of a second each, two at a time, for a second and a half: the first two end, the next two are stopped."""
    seconds = {0.01: 0.0, 0.02: 0.0, 0.03: 60.0, 0.04: 60.0, 0.05: 0.0}
    cells = [Cell.of(method="spectron", optim__lr=lr) for lr in seconds]
    summary = dict(bits_per_byte=1.0, step=8, tokens=256, seconds=0.1, peak_memory_bytes=1)
    real = grid.Children.run

    def run(self, command, environment):
        lr = float(command[command.index("--optim.lr") + 1])
        said = json.dumps({"val_loss": lr, **summary})
        code = f"import time; time.sleep({seconds[lr]}); print({said!r})"
        return real(self, [sys.executable, "-c", code], environment)

    monkeypatch.setattr(grid.Children, "run", run)
    said = []
    began = time.monotonic()
    rows = run_grid(cells, tmp_path, jobs=2, say=said.append, minutes=3 / 60)
    assert time.monotonic() - began < 30
    assert [row["val_loss"] for row in rows] == [0.01, 0.02] and len(finished(tmp_path)) == 2
    assert "with 3 to go" in said[-1]
    seconds.update(dict.fromkeys(seconds, 0.0))
    rows = run_grid(cells, tmp_path, jobs=2, say=said.append, minutes=5)
    assert [row["val_loss"] for row in rows] == list(seconds) and len(finished(tmp_path)) == 5
