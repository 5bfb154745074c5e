"""The command line as a whole: help, versions, output streams, speed of the first answer."""

import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest

import nativerank
from nativerank.cli.main import COMMANDS
from nativerank.hub.generate import generate
from nativerank.train.metrics import JsonLines

ESCAPE = "\x1b"


def python(*words, **options):
    command = [sys.executable, "-W", "error", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, **options)


def imported_by(code):
    out = python("-c", f"{code}\nimport sys; print(*sys.modules, file=sys.stderr)").stderr
    return {name.partition(".")[0] for name in out.split()}


def test_importing_the_package_is_light():
    heavy = {"torch", "transformers", "numpy", "tokenizers", "jsonargparse", "rich"}
    assert not heavy & imported_by("import nativerank")
    assert not heavy & imported_by("from nativerank.cli.main import main; main(['--help'])")
    assert "torch" in imported_by("import nativerank; nativerank.linalg"), "else this test sees nothing"


def test_help_comes_within_a_second():
    """Best of three, with room for a busy machine."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        out = python("-m", "nativerank", "--help").stdout
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1.5
    assert all(command in out for command in COMMANDS)


def test_the_public_api_is_there():
    for name in nativerank.__all__:
        assert getattr(nativerank, name) is not None
    assert set(nativerank.__all__) <= set(dir(nativerank))
    assert nativerank.layers.LowRankLinear and nativerank.linalg.orthogonalize
    with pytest.raises(AttributeError, match="no attribute 'factorise'"):
        _ = nativerank.factorise


def test_version(cli):
    result = cli("--version")
    assert (result.code, result.out, result.err) == (0, f"nativerank {nativerank.__version__}\n", "")


def test_no_command_is_the_overview(cli):
    assert cli().out == cli("--help").out == cli("-h").out != ""


HELPS = [["train"], ["data"], ["data", "prepare"], ["data", "info"], ["data", "verify"], ["generate"], ["bench"]]


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_every_help_ends_with_examples_that_parse(cli, monkeypatch, words):
    result = cli(*words, "--help")
    assert (result.code, result.err) == (0, "")
    lines = [line.strip() for line in result.out.splitlines()]
    start = max(i for i, line in enumerate(lines) if re.fullmatch(r"examples?:", line))
    examples = [line for line in lines[start + 1 :] if line]
    assert examples and all(line.startswith("nativerank ") for line in examples)
    for example in examples:
        parse_only(shlex.split(example)[1:], monkeypatch)


def test_the_overview_has_examples_that_parse(cli, monkeypatch):
    examples = re.findall(r"^  (nativerank [^#\n]+)", cli("--help").out, re.M)
    assert len(examples) == 3
    for example in examples:
        parse_only(shlex.split(example)[1:], monkeypatch)


def parse_only(words, monkeypatch):
    """Takes the words as far as the function that would do the work."""
    import argparse
    import importlib

    from nativerank.cli.main import Parser
    from nativerank.cli.train import parse
    from nativerank.train.resolve import resolve

    if words[0] == "train":
        config, _ = parse(words[1:])
        assert resolve(config).train.steps
        return
    parser = Parser(prog="nativerank", add_help=False)
    importlib.import_module(f"nativerank.cli.{words[0]}").add_parser(parser.add_subparsers(parser_class=Parser))
    arguments = parser.parse_args(words)
    assert isinstance(arguments, argparse.Namespace) and callable(arguments.run)


def test_every_command_has_a_line_and_a_module():
    import importlib.util

    assert all(importlib.util.find_spec(f"nativerank.cli.{command}") for command in COMMANDS)


# -- output


def test_json_prints_json_and_nothing_else(tmp_path, cli, flags):
    result = cli("train", *flags(out=tmp_path / "a"), "--json")
    summary = json.loads(result.out)
    assert result.code == 0 and summary["step"] == 8 and summary["out"] == str(tmp_path / "a")
    assert "validation loss" in result.err, "what people read goes to the other stream"
    last = json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[-1])
    assert summary == last


def test_json_to_a_file_and_quiet_is_silent(tmp_path, cli, flags):
    result = cli("train", *flags(out=tmp_path / "a"), "--quiet", "--json", tmp_path / "result.json")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 8


def test_quiet_holds_for_a_corpus_that_is_prepared_on_the_way(tmp_path, cli, flags, prepared, monkeypatch):
    from nativerank.train import setup

    asked = []
    monkeypatch.setattr(setup, "prepared_demo", lambda vocab_size, quiet: asked.append(quiet) or prepared)
    words = [
        w for pair in zip(*[iter(flags(out=tmp_path / "a"))] * 2, strict=True) if pair[0] != "--data.path" for w in pair
    ]
    assert cli("train", *words, "--quiet").err == ""
    assert asked == [True]


@pytest.mark.parametrize("words", [["--quiet"], ["--quiet", "--json"]])
def test_a_quiet_run_still_says_how_to_go_on_after_a_signal(tmp_path, cli, flags, monkeypatch, words):
    import signal

    original = JsonLines.row

    def row(self, row):
        original(self, row)
        if row["step"] == 2 and "loss" in row:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(JsonLines, "row", row)
    result = cli("train", *flags(out=tmp_path / "a"), *words)
    assert (result.code, result.out) == (130, "")
    assert result.err.startswith("stopped after step 2, saved") and "--resume auto" in result.err


def test_a_quiet_run_still_says_what_it_passed_over(tmp_path, cli, flags):
    common = dict(out=tmp_path / "a", train__checkpoint_every=4)
    assert cli("train", *flags(**common)).code == 0
    (tmp_path / "a/checkpoints/step-000008/model.safetensors").write_bytes(b"")
    result = cli("train", *flags(**common, resume="auto"), "--quiet", "--json")
    assert result.code == 0 and json.loads(result.out)["step"] == 8
    assert result.err.count("\n") == 1 and "falling back to step-000004" in result.err


def test_a_result_that_could_not_be_written_is_refused_before_the_work(tmp_path, cli, flags, prepared):
    for target, said in ((tmp_path / "no/result.json", "there is no folder"), (tmp_path, "is a folder")):
        for words in (
            ["train", *flags(out=tmp_path / "run")],
            ["generate", tmp_path],
            ["data", "verify", prepared],
            ["data", "info", prepared],
            ["data", "prepare", "x.txt", "--out", tmp_path / "data"],
            ["bench", "train", "--model.preset", "pocket"],
        ):
            result = cli(*words, "--json", target)
            assert (result.code, result.out) == (2, "") and said in result.err
            assert result.err.startswith(f"nativerank: error: --json {target}") and result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_piped_output_has_no_escape_codes_and_long_lines_stay_whole(tmp_path, cli, flags, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("nativerank.train.closing.generate", generate)  # a sample of full length
    out = tmp_path / ("long-" * 20)
    result = cli("train", *flags(out=out))
    assert result.code == 0 and ESCAPE not in result.out + result.err
    assert any(line.endswith(f"cpu -> {out}") for line in result.out.splitlines())
    assert "step 1/8" in result.out and "validation loss" in result.out and "bits per byte" in result.out
    summary = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    sample = f"{summary['prompt']} ...{summary['sample']}"
    shown = re.sub("[\x07\x08\x0b\x0c\r]", "", sample)  # rich takes out what would move the cursor
    assert len(sample) > 40 and f"sample           {shown}\n" in result.out


def test_the_start_says_how_many_matrices_stay_dense(tmp_path, cli, flags):
    common = dict(train__steps=1, train__eval_every=0)
    some = cli("train", *flags(out=tmp_path / "a", rank__exclude="[down_proj]", **common)).out
    assert "12 matrices in low rank, 2 left dense" in some
    assert "left dense" not in cli("train", *flags(out=tmp_path / "b", **common)).out


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_honoured(monkeypatch, capsys, no_color):
    from nativerank.cli.console import TrainConsole

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    facts = dict(
        model="m", method="spectron", parameters={"total": 1, "non_embedding": 1}, factorized=1, left_dense=0, steps=4,
        tokens_per_step=8, lr=0.1, aux_lr=0.1, device="cpu", out="runs/x", warnings=["w"] * 9, event="start", step=0,
    )  # fmt: skip
    with TrainConsole() as console:
        console.begin(facts)
        for step in range(1, 5):
            console.row({"step": step, "loss": 1.0, "tokens_per_second": 5.0})
    out = capsys.readouterr().out
    colours = re.findall(r"\x1b\[(?:\d+;)*(?:3[0-8]|9\d)[;\d]*m", out)
    assert bool(colours) != no_color
    assert out.count("note: w") == 3 and "6 more like these" in out


@pytest.mark.parametrize("words", [["--help"], ["data", "--help"]])
def test_a_reader_that_leaves_is_no_error(words):
    """As in `nativerank --help | head -0`, without the race of who is first."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-W", "error", "-m", "nativerank", *words]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_interrupt_before_training_is_one_word(cli, flags, tmp_path, monkeypatch):
    from nativerank.train import loop

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "open_data", interrupted)
    result = cli("train", *flags(out=tmp_path / "a"))
    assert (result.code, result.err) == (130, "nativerank: interrupted\n")


def test_telemetry_is_off(cli, monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    cli("--version")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


# -- flags


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--compile"], True),
        (["--compile", "--train.steps", "3"], True),
        (["--compile", "true"], True),
        (["--compile", "True"], True),
        (["--compile", "false"], False),
        (["--compile=false"], False),
        ([], False),
    ],
)
def test_switches(words, expected):
    from nativerank.cli.train import parse

    assert parse(words)[0].compile is expected


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    from nativerank.cli.train import parse

    (tmp_path / "run.yaml").write_text("optim:\n  lr: 1e-3\n  aux_lr: 0.5\ntrain:\n  steps: 7\n")
    config, _ = parse(["--config", str(tmp_path / "run.yaml"), "--optim.lr", "0.02"])
    assert (config.optim.lr, config.optim.aux_lr, config.train.steps) == (0.02, 0.5, 7)


def test_lists_and_tables_as_flags():
    from nativerank.cli.train import parse

    words = [
        "--rank.exclude",
        "[down_proj, '*.0.*']",
        "--rank.overrides",
        '{"q_proj": 4}',
        "--optim.betas",
        "[0.8, 0.9]",
    ]
    config, _ = parse(words)
    assert config.rank.exclude == ["down_proj", "*.0.*"] and config.rank.overrides == {"q_proj": 4}
    assert config.optim.betas == (0.8, 0.9)


def parsed(tmp_path, file, *words):
    from nativerank.cli.train import parse

    (tmp_path / "run.yaml").write_text(file)
    return parse(["--config", str(tmp_path / "run.yaml"), *words])[0]


@pytest.mark.parametrize(
    ("file", "flag", "value", "gone"),
    [
        ("rank: {value: 8}", "rank.ratio", 0.5, "rank.value"),
        ("rank: {ratio: 0.5}", "rank.value", 8, "rank.ratio"),
        ("train: {steps: 7}", "train.tokens", 1000, "train.steps"),
        ("train: {tokens: 7}", "train.steps", 3, "train.tokens"),
        ("model: {config: x.json}\nrank: {ratio: 0.5}", "init", "runs/a", "model.config"),
        ("model: {config: x.json}\nrank: {ratio: 0.5}", "init", "runs/a", "rank.ratio"),
    ],
)
def test_a_flag_beats_its_rival_in_the_file(tmp_path, file, flag, value, gone):
    from operator import attrgetter

    for words in ([f"--{flag}", str(value)], [f"--{flag}={value}"]):
        config = parsed(tmp_path, file, *words)
        assert attrgetter(flag)(config) == value and attrgetter(gone)(config) is None


def test_two_rival_flags_are_both_seen(tmp_path):
    rank = parsed(tmp_path, "rank: {value: 8}", "--rank.ratio", "0.5", "--rank.value", "4").rank
    assert (rank.ratio, rank.value) == (0.5, 4)


def test_a_runs_own_file_with_another_method_takes_that_ones_rates(tmp_path):
    import yaml

    from nativerank.cli.train import parse
    from nativerank.config import to_dict
    from nativerank.train.resolve import resolve

    def resolved(*words):
        return resolve(parse(["--model.preset", "pocket", "--out", "x", *words])[0])

    file = yaml.safe_dump(to_dict(resolved("--method", "dense-muon")))
    config = resolve(parsed(tmp_path, file, "--method", "lowrank-adamw"))
    assert config == resolved("--method", "lowrank-adamw")
    assert resolve(parsed(tmp_path, file, "--method", "dense-muon")) == resolved("--method", "dense-muon")


def test_a_rate_chosen_for_another_method_is_not_taken_along(tmp_path, cli):
    file = "method: spectron\noptim: {lr: 0.0123}"
    (tmp_path / "run.yaml").write_text(file)
    result = cli("train", "--config", tmp_path / "run.yaml", "--method", "lowrank-adamw")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "optim.lr 0.0123 was chosen for spectron; give --optim.lr too (null: lowrank-adamw's own)" in result.err
    assert parsed(tmp_path, file, "--method", "lowrank-adamw", "--optim.lr", "0.5").optim.lr == 0.5
    assert parsed(tmp_path, file, "--method", "lowrank-adamw", "--optim.lr", "null").optim.lr is None


@pytest.mark.parametrize("file", ["# nothing but words\n", "", "---\n"])
def test_a_file_without_keys_sets_none(tmp_path, file):
    from nativerank.config import RunConfig

    assert parsed(tmp_path, file) == RunConfig()
    (tmp_path / "run.yaml").write_text(file)
    from nativerank.cli.train import parse

    assert parse([f"--config={tmp_path / 'run.yaml'}", "--train.steps", "3"])[0].train.steps == 3


@pytest.mark.parametrize(
    ("file", "said"), [("- a\n", "holds a list"), ("words", "holds a text"), ("a: [", "cannot read")]
)
def test_a_file_that_holds_no_keys_is_named(tmp_path, cli, file, said):
    (tmp_path / "run.yaml").write_text(file)
    result = cli("train", "--config", tmp_path / "run.yaml")
    assert result.code == 2 and result.err.count("\n") == 1
    assert str(tmp_path / "run.yaml") in result.err and said in result.err


def test_data_without_a_command_lists_them(cli):
    result = cli("data")
    assert (result.code, result.err) == (2, "nativerank: error: data needs a command: prepare, info or verify\n")
