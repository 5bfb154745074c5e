"""watch: a run on 80 columns, once in a pipe, until its end on a terminal; one line for what is wrong."""

import io
import json
import re
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from nativerank.cli.dashboard import ASCII, BLOCKS, SHOWN_MATRICES, Dashboard, spark
from nativerank.report.watch import Series, watch_run
from nativerank.train.metrics import read_rows

PAGE = Path(__file__).parents[2] / "docs" / "watch.md"


@pytest.fixture
def finished(trained_once):
    return trained_once(train__probe_every=4, train__eval_every=4, train__checkpoint_every=4)


@pytest.fixture
def beside(finished, tmp_path):
    """beside(count): a folder with the first rows of a run, as if it went on."""

    def make(count):
        lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:count]))
        return tmp_path, lines[count:]

    return make


def test_in_a_pipe_it_is_text_once(cli, finished):
    shown = cli("watch", finished)
    end = read_rows(finished)[-1]
    assert (shown.code, shown.err) == (0, "") and "\x1b" not in shown.out
    lines = [line.rstrip() for line in shown.out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0].endswith("finished") and "step 8 of 8" in shown.out and "100%" in shown.out
    assert any(line.split()[:4] == ["at", "the", "end", f"{end['val_loss']:.4f}"] for line in lines)
    heads = {line.split("  ")[0] for line in lines}
    assert {"loss", "val loss", "tokens/s", "lr", "grad norm", "||dW|| / lr"} <= heads
    assert any(line.startswith("layers.0.self_attn.q_proj") for line in lines)
    assert any(line.split() == ["checkpoints", "4", "8"] for line in lines)
    assert cli("watch", finished, "--once").out == shown.out


def test_json_is_for_programs(cli, finished, tmp_path):
    record = json.loads(cli("watch", finished, "--json").out)
    assert (record["state"], record["step"], record["steps"], record["seconds_left"]) == ("finished", 8, 8, 0.0)
    rows = read_rows(finished)
    assert record["loss"] == [r["loss"] for r in rows if "loss" in r][-1] and record["val_loss"] == rows[-1]["val_loss"]
    assert record["probed_step"] == 8 and record["checkpoints"] == [4, 8] and record["device"] == "cpu"
    to_file = cli("watch", finished, "--quiet", "--json", tmp_path / "x.json")
    assert (to_file.code, to_file.out, to_file.err) == (0, "", "")
    assert json.loads((tmp_path / "x.json").read_text())["step"] == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no such run: nowhere"),
        (["."], "is not a run folder: it has no metrics.jsonl"),
        (["damaged"], "damaged/metrics.jsonl is damaged: line 1 is no JSON"),
        (["damaged", "--every", "0"], "--every 0: the seconds between two looks must be above 0"),
        (["damaged", "--every", "nan"], "--every nan: the seconds"),
        (["damaged", "--quiet"], "--quiet leaves nothing to look at"),
        ([], "required: RUN"),
    ],
)
def test_what_is_wrong_is_one_line(cli, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/metrics.jsonl").write_text("{\n{}\n")
    result = cli("watch", *words)
    assert result.code == 2 and result.out == "" and said in result.err and result.err.count("\n") == 1


def test_a_run_that_has_not_begun(cli, tmp_path):
    (tmp_path / ".lock").touch()
    shown = cli("watch", tmp_path)
    assert shown.code == 0 and "waiting" in shown.out and "nothing is written yet" in shown.out


def test_a_run_that_goes_on_says_how_far_it_is(cli, beside):
    folder, _ = beside(6)
    shown = cli("watch", folder, "--once")
    assert "step 5 of 8" in shown.out and "62%  about 0:00:0" in shown.out and "running" in shown.out


def test_on_a_terminal_it_follows_the_run_to_its_end(terminal, beside):
    folder, rest = beside(4)

    def go_on():
        for line in rest:
            time.sleep(0.1)
            with (folder / "metrics.jsonl").open("a") as stream:
                stream.write(line)

    writer = threading.Timer(1.5, go_on)
    writer.start()
    shown = terminal("watch", folder, "--every", "0.1")
    writer.join()
    assert shown.code == 0
    assert b"\x1b[?1049h" in shown.out and b"\x1b[?1049l" in shown.out, "a screen of its own, and back"
    after = shown.out.split(b"\x1b[?1049l")[1]
    assert b"step 3 of 8" in shown.out and b"step 8 of 8" in after and b"finished" in after


def test_ctrl_c_is_how_one_leaves(terminal, beside):
    folder, _ = beside(4)
    shown = terminal("watch", folder, "--every", "600", until=b"step 3 of 8")
    assert shown.code == 0 and "nativerank:" not in shown.text
    assert b"step 3 of 8" in shown.out.split(b"\x1b[?1049l")[1]


def test_no_color_is_heeded_on_a_terminal(terminal, finished):
    assert b"\x1b[" in terminal("watch", finished, "--once").out
    plain = terminal("watch", finished, "--once", NO_COLOR="1")
    assert plain.code == 0 and b"\x1b" not in plain.out


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_it_fits_the_terminal(finished, columns):
    console = Console(width=columns, record=True, file=open("/dev/null", "w"), force_terminal=True)
    with console.file:
        console.print(Dashboard(watch_run(finished)))
        assert max(len(line.rstrip()) for line in console.export_text().splitlines()) <= columns


@pytest.mark.parametrize("columns", [30, 40, 60])
def test_numbers_stay_whole_where_there_is_little_room(finished, columns):
    watched = watch_run(finished)
    console = Console(width=columns, record=True, file=io.StringIO())
    console.print(Dashboard(watched))
    text = console.export_text()
    assert f"{watched.series['loss'].last:.4f}" in text and f"{watched.series['tokens_per_second'].last:,.0f}" in text
    for values in list(watched.probes.values())[:SHOWN_MATRICES]:
        assert f"{values['sigma_W']:.3g}" in text and f"{values['update_norm']:.3g}" in text


def test_a_terminal_without_blocks_gets_ascii(finished, tmp_path):
    with (tmp_path / "out.txt").open("w", encoding="ascii", errors="replace") as file:
        Console(width=80, file=file).print(Dashboard(watch_run(finished)))
    assert (tmp_path / "out.txt").read_text().isascii()


def test_somebodys_text_steers_no_terminal(tmp_path, cli):
    start = {"event": "start", "step": 0, "steps": 2, "model": "[red]\x1b[2Jm", "method": "[/]", "parameters": 3}
    probes = {"[bold]\x07w": {"sigma_W": 1.0}}
    rows = [start, {"step": 1, "loss": 1.0, "probes": probes}, {"event": "x\ny", "step": 1, "reason": "\x1b]0;t\x07"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = cli("watch", tmp_path)
    assert shown.code == 0 and "\x1b" not in shown.out and "\x07" not in shown.out
    assert "[red]?[2Jm, [/]" in shown.out and "[bold]?w" in shown.out and "x?y: ?]0;t?" in shown.out


def test_a_sparkline_has_its_lowest_and_highest():
    series = Series()
    for n, value in enumerate([3.0, float("nan"), 1.0, 2.0]):
        series.put(n, value)
    assert spark(series, ASCII, 10) == "#_" + ASCII[round(3.5)]
    assert len(spark(series, BLOCKS, 2)) == 2 and spark(Series(), BLOCKS, 5) == ""
    constant = Series()
    constant.put(1, 5.0)
    assert spark(constant, BLOCKS, 5) == BLOCKS[0]


def test_the_picture_in_the_docs_has_every_line(cli, finished):
    (picture,) = re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert max(map(len, picture.splitlines())) <= 80

    def heads(text):
        return {line.split("  ")[0].rstrip() for line in text.splitlines() if "\u2581" in line}

    assert heads(cli("watch", finished).out) == heads(picture)
    titles = re.findall(r"^step \d+ +(sigma_W.*)$", picture, re.M)
    assert titles and all(re.search(" +".join(map(re.escape, t.split())), cli("watch", finished).out) for t in titles)
