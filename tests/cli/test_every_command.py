"""Laws of all commands: --quiet, --json, 80 columns, NO_COLOR, progress that says how long it takes."""

import argparse
import importlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nativerank.cli import console as consoles
from nativerank.cli.console import PLAIN_EVERY_SECONDS, Lines, progress
from nativerank.cli.main import COMMANDS, Parser
from nativerank.terminal import WIDTH
from nativerank.terminal import console as open_console

SOURCE = Path(consoles.__file__).parents[1]
STYLES = re.compile(rb"\x1b\[[\d;]*m")
# Their flags are read by typed parsers of their own, so that --help is what says them.
TYPED = [["train"], ["plan"], ["compare"], ["convert"]]
TYPED += [["scaling", name] for name in ("plan", "run", "fit", "report")]


def parsers(command):
    """(words, parser) of a command and of what it has below."""
    parser = Parser(prog="nativerank", add_help=False)
    importlib.import_module(f"nativerank.cli.{command}").add_parser(parser.add_subparsers(parser_class=Parser))

    def below(words, parser):
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not groups:
            yield words, parser
        for group in groups:
            for name, child in group.choices.items():
                yield from below([*words, name], child)

    return list(below([], parser))


PLAIN = [
    pytest.param(parser, id=" ".join(words))
    for command in COMMANDS
    for words, parser in parsers(command)
    if not any(action.nargs == argparse.REMAINDER for action in parser._actions)
]


@pytest.mark.parametrize("parser", PLAIN)
def test_every_plain_command_takes_quiet_and_json(parser):
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {"--quiet", "--json"} <= flags


@pytest.mark.parametrize("words", TYPED, ids=" ".join)
def test_every_typed_command_takes_quiet_and_json(cli, words):
    said = cli(*words, "--help").out
    assert "--quiet" in said and re.search(r"--json \[?\[?(FILE|JSON)", said)


def test_no_command_is_in_neither_list():
    typed = {words[0] for words in TYPED}
    plain = {str(param.id).split()[0] for param in PLAIN}
    assert typed | plain == set(COMMANDS) and not typed & plain


# -- in a pipe and on a terminal


@pytest.fixture
def sources(trained_once, prepared):
    return {"run": trained_once(train__probe_every=4), "data": prepared}


SHORT = [
    ["data", "info", "{data}"],
    ["data", "verify", "{data}"],
    ["watch", "{run}", "--once"],
    ["plan", "--model.preset", "pocket", "--on", "h100-sxm"],
    ["scaling", "plan", "--grid", "miniature"],
    ["export", "{run}", "--format", "factored", "--out", "{out}"],
    ["generate", "{run}", "--prompt", "The", "--max_new_tokens", "2"],
    ["bench", "retraction", "--repeats", "1", "--threads", "1"],
]


def tabular(line):
    """A row of a table; a sentence or a command that is longer than a line stays whole."""
    return len(re.findall(r"\S {2,}(?=\S)", line)) >= 2 or "\u2502" in line


def filled(words, sources, out):
    return [word.format(**sources, out=out) for word in words]


@pytest.mark.parametrize("words", SHORT, ids=lambda words: "-".join(words[:2]))
def test_in_a_pipe_there_are_80_columns_and_no_escape_codes(cli, sources, tmp_path, words):
    done = cli(*filled(words, sources, tmp_path / "out"))
    assert done.code == 0 and "\x1b" not in done.out + done.err
    assert [
        line
        for line in done.out.splitlines()
        if tabular(line) and len(line.rstrip()) > WIDTH and str(tmp_path) not in line
    ] == []


def test_there_is_one_way_to_a_console():
    """Which is what 80 columns and NO_COLOR hang on."""
    files = [file for file in SOURCE.rglob("*.py") if re.search(r"(?<!Train)\bConsole\(", file.read_text())]
    assert [file.name for file in files] == ["terminal.py"]


@pytest.mark.parametrize("words", [SHORT[0], SHORT[1], SHORT[5]], ids=lambda words: "-".join(words[:2]))
def test_no_color_leaves_no_styles_on_a_terminal(terminal, sources, tmp_path, words):
    done = terminal(*filled(words, sources, tmp_path / "out"), NO_COLOR="1", HF_HUB_OFFLINE="1")
    assert done.code == 0, done.text
    assert not STYLES.findall(done.out)


def test_training_on_a_terminal_has_a_bar_and_colours_only_where_they_are_wanted(terminal, flags, tmp_path):
    words = [*flags(out=tmp_path / "a"), "--json", tmp_path / "a.json"]
    coloured = terminal("train", *words)
    assert coloured.code == 0 and STYLES.findall(coloured.out) and "0:00:0" in coloured.text
    words = flags(out=tmp_path / "b")
    plain = terminal("train", *words, NO_COLOR="1")
    assert plain.code == 0 and not STYLES.findall(plain.out) and "validation loss" in plain.text


# -- the console and progress


@pytest.mark.parametrize("value", ["1", "true"])
def test_no_color_takes_bold_too(monkeypatch, capsys, value):
    monkeypatch.setenv("FORCE_COLOR", "1")
    open_console().print("[bold red]x[/]")
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", value)
    open_console().print("[bold red]x[/]")
    assert capsys.readouterr().out == "x\n"
    monkeypatch.setenv("NO_COLOR", "")  # empty is not set
    open_console().print("[bold red]x[/]")
    assert "\x1b[" in capsys.readouterr().out


def test_a_character_that_a_stream_lacks_is_no_error(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    open_console().print("caf\u00e9 \u2581")
    sys.stdout.flush()
    assert raw.getvalue() == b"caf? ?\n"


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(consoles, "time", clock)
    return clock


def test_piped_progress_is_a_line_now_and_then_with_the_time_left(clock, capsys):
    with progress(quiet=False) as watch:
        assert isinstance(watch, Lines)
        for done in range(100):
            watch("texts", done, 100)
            clock.now += 1.0
        watch("the end")
        clock.now += PLAIN_EVERY_SECONDS
        watch("the end")
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == "" and lines[0] == "texts: 15 of 100, about 85 s left"
    assert lines[1] == "texts: 30 of 100, about 70 s left" and lines[-1] == "the end" and len(lines) == 7


def test_what_is_done_before_a_phase_begins_is_not_counted_into_its_speed(clock, capsys):
    watch = Lines()
    watch("a", 50, 100)
    clock.now += 20.0
    watch("a", 60, 100)
    assert capsys.readouterr().err == "a: 60 of 100, about 80 s left\n"


def test_a_quick_command_says_nothing_in_a_pipe_and_a_quiet_one_never(clock, capsys):
    with progress(quiet=False) as watch:
        watch("a", 1, 2)
    with progress(quiet=True) as watch:
        clock.now += 1000.0
        watch("a", 1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("still", [False, True])
def test_on_a_terminal_progress_is_a_bar_with_the_time_left(monkeypatch, still):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    made = []
    monkeypatch.setattr(
        consoles, "open_console", lambda stderr: made.append(Console(file=screen, force_terminal=True)) or made[-1]
    )
    with progress(quiet=False, still=still) as watch:
        for done in range(3):
            watch("[rounds]", done, 3)
    assert "[rounds]" in screen.getvalue() and re.search(r"\d/3|-:--:--|0:00:0", screen.getvalue())


def test_a_benchmark_is_told_of_between_rounds_only(cli, monkeypatch):
    from nativerank.bench import measure

    heard = []
    with measure.told(lambda *what: heard.append(what)):
        for order, counts in measure.rounds(["a", "b"], repeats=2, warmup=1):
            heard.append((order, counts))
    assert heard[::2] == [("rounds", turn, 3) for turn in range(3)]
    assert heard[1::2] == [(["b", "a"], False), (["a", "b"], True), (["b", "a"], True)]
    list(measure.rounds(["a"], 1, 0))
    assert len(heard) == 6, "nobody listens any more"


def test_long_commands_tell_what_they_do(cli, sources, tmp_path, monkeypatch):
    """Of those that work in one piece; compare, scaling run and train say so with every cell and step."""
    said = {}

    class Recorder:
        def __init__(self):
            pass

        def __call__(self, what, done=0, total=0):
            said.setdefault(command, []).append(what)

    monkeypatch.setattr(consoles, "Lines", Recorder)
    for words in (*SHORT, ["generate", "{run}", "--prompt", "The", "--max_new_tokens", "2", "--json", "{out}.json"]):
        command = words[0]
        assert cli(*filled(words, sources, tmp_path / command)).code == 0
    assert {"plan", "export", "generate", "bench"} <= set(said)
    assert json.loads((tmp_path / "generate.json").read_text())["texts"]
