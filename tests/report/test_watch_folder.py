"""A file that grows is read once; what was undone is forgotten; half a line is no fault."""

import json
import math
import os
import time

import pytest

from nativerank.report.watch import Series, Tail, Watched, watch_run
from nativerank.train.metrics import JsonLines


def write(file, *rows, end="\n"):
    with file.open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows)[: None if end else -1])


def step(n, loss=None, **more):
    loss = 5.0 - n / 10 if loss is None else loss
    return {"step": n, "loss": loss, "lr": 0.01, "seconds": 0.5, "tokens_per_second": 100.0, "grad_norm": 1.0} | more


START = {"event": "start", "step": 0, "steps": 20, "model": "m", "method": "spectron", "parameters": {"total": 5}}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_only_what_is_new_is_read(file):
    write(file, step(1), step(2))
    tail = Tail(file)
    assert tail.read() == ([step(1), step(2)], True)
    assert tail.read() == ([], False)
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(b"#" * (size - 1))  # whoever read it again would find no JSON
    write(file, step(3))
    assert tail.read() == ([step(3)], False)


def test_half_a_line_waits_for_the_rest(file):
    tail, line = Tail(file), json.dumps(step(1))
    assert tail.read() == ([], False)  # not there yet
    file.write_text(line[:10])
    assert tail.read() == ([], True)
    with file.open("a") as stream:
        stream.write(line[10:] + "\n" + line[:5])
    assert tail.read() == ([step(1)], False)


@pytest.mark.parametrize(
    ("line", "said"), [("{oops", "line 2 is no JSON"), ("3", "line 2 is no row"), ("", "is no JSON")]
)
def test_a_damaged_line_is_one_only_before_others(file, line, said):
    write(file, step(1))
    with file.open("a") as stream:
        stream.write(line + "\n")
    tail = Tail(file)
    assert tail.read() == ([step(1)], True)
    write(file, step(2))
    with pytest.raises(ValueError, match=f"metrics.jsonl is damaged: .*{said}"):
        tail.read()


def test_bytes_that_are_no_text_are_damage(file):
    file.write_bytes(b'{"step": "\xff"}\n{}\n')
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        Tail(file).read()


def test_a_resumed_run_is_read_anew(tmp_path, file):
    write(file, START, *(step(n) for n in range(1, 9)))
    watched = watch_run(tmp_path)
    assert (watched.step, len(watched.series["loss"].steps)) == (8, 8)
    lines = JsonLines(tmp_path, 5)
    lines.row(START | {"event": "resume", "step": 5, "checkpoint": "c"})
    for n in (6, 7):
        lines.row(step(n, loss=1.0))
    lines.close()
    assert watched.update()
    assert list(watched.series["loss"].values) == [step(n)["loss"] for n in range(1, 6)] + [1.0, 1.0]
    assert [row["event"] for row in watched.events] == ["resume"]


def test_a_file_that_is_cut_in_place_is_read_anew(tmp_path, file):
    write(file, START, step(1), step(2))
    watched = watch_run(tmp_path)
    os.truncate(file, 0)
    write(file, START)
    assert watched.update() and watched.step == 0 and not watched.series["loss"].steps


def test_after_a_rollback_the_last_row_of_a_step_counts(tmp_path, file):
    spike = step(6, loss=99.0, event="loss_spike", action="rollback", rolled_back_to=3)
    write(file, START, *(step(n) for n in range(1, 6)), spike)
    watched = watch_run(tmp_path)
    assert watched.step == 3 and watched.series["loss"].last == 99.0
    write(file, step(4, loss=2.5))
    watched.update()
    assert list(watched.series["loss"].steps) == [1, 2, 3, 4] and watched.series["loss"].last == 2.5
    assert [row["event"] for row in watched.events] == ["loss_spike"]


def test_200_000_rows_are_kept_as_numbers(tmp_path, file):
    rows = [START] + [step(n, tokens=n * 64) for n in range(1, 200_001)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    watched = watch_run(tmp_path)
    assert watched.step == 200_000 and watched.series["loss"].values.itemsize == 8
    began = time.perf_counter()
    write(file, step(200_001))
    watched.update()
    assert time.perf_counter() - began < 0.1, "a look costs what is new"
    assert watched.series["loss"].steps[-1] == 200_001


@pytest.mark.parametrize(
    ("rows", "age", "state"),
    [
        ([], 0, "waiting"),
        ([START], 0, "running"),
        ([START, step(1)], 30, "running"),
        ([START, step(1)], 90, "silent"),
        ([START, step(1, seconds=60.0)], 90, "running"),  # steps are slow
        ([START, step(1), {"event": "interrupted", "step": 1}], 90, "interrupted"),
        ([START, step(1, loss="nan", event="loss_not_finite", action="stop")], 90, "diverged"),
        ([START, step(20), {"event": "end", "step": 20, "val_loss": 3.0}], 90, "finished"),
        ([START, step(20), {"event": "end", "step": 20}, START | {"event": "resume"}], 0, "running"),
    ],
)
def test_states(tmp_path, file, rows, age, state):
    write(file, *rows)
    os.utime(file, (time.time() - age,) * 2)
    assert watch_run(tmp_path).state == state


def test_the_time_that_is_left_is_that_of_steps_like_the_last_ones(tmp_path, file):
    write(file, START, *(step(n, seconds=9.0 if n == 1 else 0.5) for n in range(1, 11)))
    watched = watch_run(tmp_path)
    assert watched.seconds_left == pytest.approx(10 * (9 + 9 * 0.5) / 10)
    write(file, {"event": "end", "step": 20})
    watched.update()
    assert watched.seconds_left == 0.0


def test_the_record_is_json_whatever_the_rows_hold(tmp_path, file):
    probes = {"a.q": {"sigma_W": 1.5, "update_ratio": 0.5}, "a.k": {"sigma_W": "nan", "update_ratio": 0.75}, "b": 3}
    odd = {"step": 2, "loss": "nan", "lr": None, "grad_norm": "inf", "seconds": True, "probes": probes}
    write(file, START, step(1), odd, {"event": ["x"]}, {"step": "three"}, {})
    watched = watch_run(tmp_path)
    record = json.loads(json.dumps(watched.record(), allow_nan=False))
    assert record["step"] == 2 and record["loss"] is None and record["lr"] is None and record["grad_norm"] is None
    assert record["probes"] == {
        "a.q": {"sigma_W": 1.5, "update_ratio": 0.5}, "a.k": {"sigma_W": None, "update_ratio": 0.75},
    }  # fmt: skip
    assert watched.ratios.last == 0.75 and record["model"] == "m" and record["steps"] == 20


def test_checkpoints_are_those_that_have_their_name(tmp_path, file):
    write(file, START)
    for name in ("step-000010", "step-000002", ".step-000020.partial-x", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert watch_run(tmp_path).checkpoints() == [2, 10]


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such run: .*nowhere"):
        watch_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is not a run folder: it has no metrics\.jsonl"):
        watch_run(tmp_path)
    (tmp_path / ".lock").touch()  # it reads its data
    assert watch_run(tmp_path).state == "waiting" and math.isnan(Watched(tmp_path).seconds_left)


def test_a_series_forgets_what_comes_again():
    series = Series()
    for n in range(5):
        series.put(n, float(n))
    series.put(2, math.nan)
    assert list(series.steps) == [0, 1, 2] and series.recent(2) == 1.0 and math.isnan(Series().recent(3))
