"""nativerank compare: real cells of a few steps, and bad input in one line."""

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from nativerank.cli.compare import named_study, read_request
from nativerank.cli.main import main
from nativerank.experiments import grid


@pytest.fixture
def in_process(monkeypatch):
    """Cells run in this process, which spares them their imports."""

    def run(self, command, environment):
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = main(command[3:])
        return code, out.getvalue(), err.getvalue()

    monkeypatch.setattr(grid.Children, "run", run)


@pytest.fixture
def refused(tmp_path, cli, flags):
    """refused(*words): the one line of an error that made nothing."""

    def check(*words, out=None):
        before = sorted(tmp_path.rglob("*"))
        out = [] if out == "" else ["--out", out or tmp_path / "cmp"]
        result = cli("compare", *flags(), *words, *out)
        assert (result.code, result.out) == (2, ""), result
        assert result.err.startswith("nativerank: error: ") and result.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return result.err.removeprefix("nativerank: error: ").strip()

    return check


def test_two_arms_from_the_command_line_to_the_figures(tmp_path, cli, flags, in_process):
    pytest.importorskip("matplotlib")
    arms = "spectron,dense-adamw[optim.lr=0.004]"
    words = [*flags(train__steps=4), "--methods", arms, "--lrs", "0.5x,1x", "--seeds", "2", "--out", tmp_path / "cmp"]
    result = cli("compare", *words)
    assert result.code == 0, result.err
    assert result.out.splitlines()[0].startswith("8 runs, 1 at a time: about 1 min to go")
    assert "[8/8] dense-adamw[optim.lr=0.004], lr 0.004" in result.out
    assert {file.name for file in (tmp_path / "cmp").iterdir()} == {
        *("request.json", "results.jsonl", "compare.json", "table.md", "curves.svg", "rates.svg", "cells"),
    }
    rows = [json.loads(line) for line in (tmp_path / "cmp" / "results.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["parameters"]["total"] > 0 and row["flops"] > 0 and row["seconds"] > 0
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 1 << 20
    record = json.loads((tmp_path / "cmp" / "compare.json").read_text())
    assert [arm["n"] for arm in record["arms"]] == [2, 2] and record["environment"]["commit"]
    assert len(record["curves"]["spectron"]["train"]) == 4
    assert record["curves"]["spectron"]["validation"][-1][1] == pytest.approx(record["arms"][0]["val_losses"][0])
    # Again: nothing is run; JSON alone on standard output.
    again = cli("compare", *words, "--json")
    assert again.code == 0 and json.loads(again.out)["best"] == record["best"]
    assert "val_loss" not in again.err and again.err.startswith("8 runs, all done\n")
    assert len((tmp_path / "cmp" / "results.jsonl").read_text().splitlines()) == len(rows)


def test_divergence_is_a_result(tmp_path, cli, flags, in_process, monkeypatch):
    """A run that the guard stops ends by its own exit code, and the comparison goes on."""
    from nativerank.train.guard import Guard

    def judge(self, loss, grad_norm, judge_step=Guard.judge_step):
        return judge_step(self, float("nan"), grad_norm)

    monkeypatch.setattr(Guard, "judge_step", judge)
    alone = cli("train", *flags(), "--out", tmp_path / "run")
    assert alone.code == 3 and "the loss is not finite" in alone.err and alone.err.count("nativerank: error") == 1
    result = cli("compare", *flags(), "--methods", "spectron", "--seeds", "2", "--quiet", "--out", tmp_path / "cmp")
    assert (result.code, result.out) == (0, ""), result
    (arm,) = json.loads((tmp_path / "cmp" / "compare.json").read_text())["arms"]
    assert (arm["diverged"], arm["failed"], arm["n"]) == (2, 0, 0)


def test_nothing_finished_is_an_error_with_the_first_reason(tmp_path, cli, flags, monkeypatch):
    monkeypatch.setattr(grid.Children, "run", lambda self, command, environment: (1, "", "trace\nout of memory\n"))
    result = cli("compare", *flags(), "--methods", "spectron", "--seeds", "2", "--quiet", "--out", tmp_path / "cmp")
    assert (result.code, result.out) == (1, "")
    assert result.err == "nativerank: error: no run finished; the first one: out of memory\n"
    assert "2 of 2 cells failed; no run finished" in (tmp_path / "cmp" / "table.md").read_text()


def test_a_plan_shows_the_runs_and_makes_none(tmp_path, cli, flags, monkeypatch):
    words = [*flags(), "--methods", "spectron,dense-adamw", "--lrs", "0.1,0.2", "--seeds", "3"]
    out = tmp_path / "deep" / "cmp"
    result = cli("compare", *words, "--plan", "--jobs", "2", "--out", out)
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[:3] == ["12 runs, 2 at a time: about 1 min to go", "2 arms:", "  spectron: 6 runs"]
    assert lines[3] == "    lr 0.1, aux_lr 0.003, init_scale 0.5774 (3 seeds)" and "  dense-adamw: 6 runs" in lines
    assert not (tmp_path / "deep").exists()
    one = cli("compare", *flags(), "--methods", "spectron", "--seeds", "1", "--plan", "--json", "--out", out)
    assert json.loads(one.out)["plan"][:3] == ["1 run, 1 at a time: about 1 min to go", "1 arm:", "  spectron: 1 run"]
    # Of a study too, which writes model configs; and beside a comparison nothing changes.
    study = ["--study", "lr-robustness", "--data.path", words[words.index("--data.path") + 1], "--plan"]
    out.mkdir(parents=True)
    result = cli("compare", *study, "--out", out)
    assert result.code == 0 and "  spectron, d_model 64: 5 runs" in result.out.splitlines()
    assert list(out.iterdir()) == []


def test_without_matplotlib_one_line_says_how(tmp_path, cli, flags, in_process, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli("compare", *flags(train__steps=1), "--methods", "spectron", "--seeds", "1", "--out", tmp_path / "cmp")
    assert result.code == 0 and "figures need matplotlib: pip install 'nativerank[report]'" in result.out
    assert not list((tmp_path / "cmp").glob("*.svg"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "compare needs --methods A,B,... or --study NAME"),
        (["--methods", ""], "--methods names no method"),
        (["--methods", "spectron,sprectron"], "unknown method 'sprectron'; did you mean spectron? (methods: "),
        (["--methods", "spectron[optim.lr=1"], "brackets do not fit in --methods 'spectron[optim.lr=1'"),
        (["--methods", "spectron", "--lrs", "fast"], "--lrs takes numbers, or multiples such as 0.5x, got 'fast'"),
        (["--methods", "spectron", "--lrs", ""], "--lrs is empty"),
        (["--methods", "spectron", "--seeds", "0"], "--seeds must be a whole number of at least 1, got 0"),
        (["--methods", "spectron", "--seeds", "two"], "--seeds must be a whole number of at least 1, got two"),
        (["--methods", "spectron", "--jobs", "0"], "--jobs must be a whole number of at least 1, got 0"),
        (["--methods", "spectron", "--budget", "time"], "--budget is tokens or flops, got 'time'"),
        (["--methods", "spectron", "--tune", "momentum"], "--tune takes coordinates (lr, aux_lr, init_scale), got"),
        (["--methods", "spectron", "--tune", "--lrs", "1x"], "--tune searches by itself, so --lrs has no meaning"),
        (["--metods", "spectron"], "unknown config key metods; did you mean methods?"),
        (["--methods", "spectron", "--train.stesp", "3"], "unknown config key train.stesp; did you mean train.steps?"),
        (["--methods", "spectron", "--method", "spectron"], "--method is given by --methods in a comparison"),
        (["--methods", "spectron", "--train.seed", "3"], "--train.seed is given by --seeds in a comparison"),
        (["--methods", "spectron", "--rank.value", "4", "--ratios", "0.5"], "give --rank.value or --ratios, not both"),
        (["--methods", "spectron", "--rank.value", "99"], "spectron: rank of model.layers.0.self_attn.q_proj must"),
        (["--study", "ablaton"], "unknown study 'ablaton'; did you mean ablation? (studies: ablation, lr-robustness,"),
        (["--study", "ablation", "--methods", "spectron"], "--study ablation has its own arms and rates, so --methods"),
        (["--study", "equal-flops", "--budget", "flops"], "--study equal-flops has its own budget, so --budget"),
        (
            ["--methods", "spectron[optim.lr=2]"],
            "spectron[optim.lr=2]: spectron's optim.lr is a bound on ||dW|| and must be",
        ),
        (
            ["--methods", "spectron", "--lrs", "0.1,2"],
            "spectron at lr 2: spectron's optim.lr is a bound on ||dW|| and must",
        ),
        (["--methods", "spectron", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_line(refused, words, said):
    assert refused(*words).startswith(said)


def test_a_folder_is_needed_and_must_be_free(refused, tmp_path):
    assert refused("--methods", "spectron", out="").startswith("compare needs --out DIR")
    (tmp_path / "file").write_text("x")
    assert refused("--methods", "spectron", out=tmp_path / "file").startswith(f"--out {tmp_path / 'file'} is a file")
    (tmp_path / "full" / "x").mkdir(parents=True)
    assert "is not empty and holds no comparison" in refused("--methods", "spectron", out=tmp_path / "full")


def test_another_comparison_in_the_folder(tmp_path, cli, flags, in_process):
    words = ["--methods", "spectron", "--seeds", "1", "--quiet", "--out", tmp_path / "cmp"]
    assert cli("compare", *flags(train__steps=1), *words).code == 0
    other = cli("compare", *flags(train__steps=2), *words)
    assert other.code == 2 and "holds another comparison, which differs in train.steps; choose" in other.err
    shutil.rmtree(tmp_path / "cmp" / "cells")  # figures come from the rest, curves are empty
    assert cli("compare", *flags(train__steps=1), *words).code == 0


def test_a_study_sets_defaults_that_flags_overrule(tmp_path):
    words = ["--study", "update-norm", "--jobs", "2", "--out", str(tmp_path / "x")]
    request, _ = read_request(words)
    assert request.common["train.probe_every"] == 10 and request.common["optim.aux_lr"] == 0.003
    assert (request.seeds, request.jobs, request.budget) == (1, 2, "tokens")
    again, _ = read_request([*words, "--train.probe_every", "20", "--train.steps", "5", "--seeds", "4"])
    assert "train.probe_every" not in again.common, "20 is what a run does anyway"
    assert again.common["train.steps"] == 5 and again.seeds == 4
    assert named_study(["--study=ablation"]) == "ablation" and named_study(["--studies", "x"]) is None


def test_help_shows_examples_and_the_defaults_of_a_comparison(cli):
    result = cli("compare", "--help")
    assert result.code == 0
    assert "nativerank compare --study lr-robustness" in result.out and "--init_scales" in result.out
    assert "METHOD[KEY=VALUE;...]" in result.out
