"""nativerank scaling plan|run|fit|report from the command line, bad input included."""

import csv
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from nativerank.cli.main import main
from nativerank.scaling.parametric import Parametric
from nativerank.train.folder import read_config

LAUNCH = Path(__file__).parents[2] / "launch"
TINY = ["--sizes", "pocket@32x1x2,pocket@32x2x2,pocket@64x1x4", "--budgets", "4e9,8e9", "--methods", "spectron"]
TINY += ["--ratios", "0.25", "--convention", "exact"]


@pytest.fixture
def table(tmp_path):
    """table(**changes): a CSV of two groups made from known laws; returns its path."""

    def make(name="sweep.csv", drop=None, change=None, budgets=(1e18, 3e18, 9e18)):
        rows = []
        for method, ratio, law in (
            ("dense-adamw", "", Parametric(1.8, 480.0, 2085.0, 0.348, 0.366)),
            ("spectron", 0.25, Parametric(1.8, 400.0, 2085.0, 0.352, 0.366)),
        ):
            for flops in budgets:
                for step in range(-3, 4):
                    params = float(law.best_params(flops)) * math.exp(0.45 * step)
                    loss = float(law.loss(params, flops / 6 / params)) * (1 + 5e-4 * math.sin(7 * step + flops))
                    rows.append({"params": params, "tokens": flops / 6 / params, "flops": flops, "loss": loss})
                    rows[-1] |= {"method": method, "rank_ratio": ratio}
        if change:
            number, column, value = change
            rows[number][column] = value
        columns = [name for name in rows[0] if name != drop]
        file = tmp_path / name
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return str(file)

    return make


def call(capsys, *argv):
    """(exit code, stdout, stderr) of a command."""
    code = main(["scaling", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def error(capsys, *argv):
    """The one line of an error."""
    code, _, err = call(capsys, *argv)
    lines = [line for line in err.splitlines() if line.startswith("nativerank: error: ")]
    assert code == 2 and len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize("action", ["plan", "run", "fit", "report"])
def test_help_has_an_example(capsys, action):
    code, out, _ = call(capsys, action, "--help")
    assert code == 0 and "examples:" in out and f"nativerank scaling {action}" in out
    assert action in call(capsys, "--help")[1]


def test_a_plan_is_a_table_and_json(capsys, tmp_path):
    code, out, _ = call(capsys, "plan", *TINY, "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert code == 0 and [cell["number"] for cell in plan["cells"]] == list(range(6))
    assert "spectron, rank ratio 0.25, pocket: 6 runs" in out and max(map(len, out.splitlines()[:8])) <= 80
    assert plan["totals"]["flops"]["exact"] == sum(cell["flops"]["exact"] for cell in plan["cells"])
    code, out, _ = call(capsys, "plan", *TINY, "--on", "h100-sxmx2", "--price", "3", "--json")
    totals = json.loads(out)["totals"]
    assert totals["devices"] == 2 and totals["cost"] == pytest.approx(totals["hours"] * 6)


def test_the_paper_grid_is_one_flag_away(capsys):
    _, out, _ = call(capsys, "plan", "--grid", "spectron", "--budgets", "2.2e18", "--json")
    assert [cell["steps"] for cell in json.loads(out)["cells"]][:3] == [7368, 5154, 3736]
    assert json.loads(out)["totals"]["runs"] == 12


def test_from_a_plan_to_a_report(capsys, tmp_path, monkeypatch):
    """Real runs of a few steps: run in slices, as tasks, fit, report; every number is that of the run folders."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "sweep"
    few = [word.replace("32x1x2,pocket@32x2x2,pocket@", "32x1x2,pocket@").replace("4e9,8e9", "4e9") for word in TINY]
    code, said, _ = call(capsys, "run", *few, "--out", out, "--cell", "1")
    assert code == 0 and "1 of 1 runs done" in said
    code, said, _ = call(capsys, "run", "--out", out, "--jobs", "2")
    assert code == 0 and "2 runs (1 done), 2 at a time" in said and "2 of 2 runs done" in said
    assert (out / "table.md").read_text().startswith("# 2 runs")
    with (out / "runs.csv").open() as stream:
        rows = {row["size"]: row for row in csv.DictReader(stream)}
    ends = {}
    for folder in (out / "cells").iterdir():
        end = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        ends[read_config(folder).model.preset] = end
    assert rows.keys() == ends.keys() and len(rows) == 2
    for size, row in rows.items():
        assert float(row["loss"]) == ends[size]["val_loss"] and float(row["tokens"]) == ends[size]["tokens"]
        assert float(row["flops"]) == pytest.approx(ends[size]["train_flops"])
        assert float(row["params"]) == ends[size]["parameters"]["total"]
    assert "needs 6 runs, got 2" in error(capsys, "fit", out, "--quiet")


def test_a_fit_shows_writes_and_draws(capsys, table, tmp_path):
    code, out, _ = call(capsys, "fit", table(), "--samples", "50", "--out", tmp_path / "fit")
    assert code == 0 and "IsoFLOP: best N" in out and "paper: low rank N ~ C^0.479" in out
    assert max(map(len, out.splitlines()[:5])) <= 80
    found = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert list(found["groups"]) == ["dense-adamw", "spectron rho=0.25"]
    for name in ("isoflop", "frontier", "losses"):
        assert (tmp_path / "fit" / f"{name}.svg").stat().st_size > 5000
    code, out, _ = call(capsys, "fit", table(), "--samples", "50", "--json")
    assert code == 0 and json.loads(out)["groups"].keys() == found["groups"].keys()


def test_a_single_group_has_the_shape_of_the_contract(capsys, table, tmp_path):
    rows = Path(table()).read_text().splitlines()
    file = tmp_path / "one.csv"
    file.write_text("\n".join([rows[0], *(row for row in rows if "dense" in row)]))
    _, out, _ = call(capsys, "fit", file, "--samples", "50", "--json")
    found = json.loads(out)
    assert {"n_exponent", "d_exponent", "n_interval", "d_interval"} <= found["isoflop"].keys()
    assert {"E", "A", "B", "alpha", "beta"} <= found["parametric"].keys()
    assert found["isoflop"]["n_exponent"] == pytest.approx(0.366 / 0.714, abs=0.01)


def test_a_report_of_a_fit_is_that_of_its_runs(capsys, table, tmp_path):
    call(capsys, "fit", table(), "--out", tmp_path / "fit", "--quiet")
    question = ["--budget", "1e20", "--inference", "1e11"]
    _, out, _ = call(capsys, "report", tmp_path / "fit" / "fit.json", *question, "--json")
    _, again, _ = call(capsys, "report", table(), *question, "--json")
    assert json.loads(out) == json.loads(again)
    code, out, _ = call(capsys, "report", table(), *question, "--out", tmp_path / "report")
    assert code == 0
    assert max(map(len, out.splitlines()[:-1])) <= 80  # the last one names the folder
    said = " ".join(out.split())
    assert "fewer parameters" in said and "with equal prefactors save 48% there" in said
    assert "must meet at 0.043 FLOPs" in said and "EXTRAPOLATED by 7.0 decades" in said
    assert "break-even" in said and "100.00G tokens served (parametric laws)" in said
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"scaling-report.json", "saving.svg"}


def test_a_report_of_two_fits_is_that_of_one(capsys, table, tmp_path):
    rows = Path(table()).read_text().splitlines()
    for name in ("dense", "spectron"):
        (tmp_path / f"{name}.csv").write_text("\n".join([rows[0], *(row for row in rows if name in row)]))
        call(capsys, "fit", tmp_path / f"{name}.csv", "--samples", "50", "--json", tmp_path / f"{name}.json", "--quiet")
    call(capsys, "fit", table(), "--samples", "50", "--json", tmp_path / "both.json", "--quiet")
    fits = [tmp_path / "spectron.json", tmp_path / "dense.json"]
    _, apart, _ = call(capsys, "report", *fits, "--budget", "1e20", "--json")
    _, joint, _ = call(capsys, "report", tmp_path / "both.json", "--budget", "1e20", "--json")
    apart, joint = json.loads(apart)["saving"], json.loads(joint)["saving"]  # their budgets are means of runs
    assert apart["at_budget"] == pytest.approx(joint["at_budget"]) and apart["interval"] == pytest.approx(
        joint["interval"]
    )
    assert "'dense-adamw' stands in another fit" in error(capsys, "report", fits[1], tmp_path / "both.json")
    assert "is fitted already" in error(capsys, "report", fits[0], table())
    fits[0].write_text('{"groups": {"a": {"curves": {}}}, "surface": null}')
    assert "is no fit that" in error(capsys, "report", fits[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "loss"}, "row 1: no column loss"),
        ({"change": (3, "tokens", "many")}, "row 5, column tokens: 'many' is no number"),
        ({"change": (3, "loss", "nan")}, "row 5, column loss: nan is not a finite number"),
        ({"change": (3, "flops", 1e9)}, "row 5, column flops: 1e+09 contradicts 6 params tokens"),
        ({"change": (3, "tokens", 1e3)}, "row 5, column flops"),
    ],
)
def test_bad_tables_name_row_and_column(capsys, table, change, message):
    assert message in error(capsys, "fit", table(**change))


def test_bad_flags_are_one_line(capsys, table, tmp_path):
    file = table()
    assert "no such file or folder: nowhere" in error(capsys, "fit", "nowhere")
    assert "approaches are isoflop and parametric and surface, got all" in error(
        capsys, "fit", file, "--approaches", "all"
    )
    assert "needs a method that ran with 3 rank ratios" in error(capsys, "fit", file, "--approaches", "surface")
    assert "unknown FLOPs convention '7nd'" in error(capsys, "fit", file, "--convention", "7nd")
    assert "need 2 budgets" in error(capsys, "fit", table("b.csv", budgets=(1e18,)), "--approaches", "isoflop")
    assert "no group 'x'" in error(capsys, "report", file, "--dense", "x")
    assert "--budget must be a finite number above 0" in error(capsys, "report", file, "--budget", "-3")
    assert "is no fit that" in error(capsys, "report", "missing.json")
    assert "scaling takes plan, run, fit, report" in error(capsys, "plane")
    assert "did you mean miniature" in error(capsys, "plan", "--grid", "minature")
    assert "--optim.lr is given by --lrs in a sweep" in error(capsys, "plan", *TINY, "--optim.lr", "1")
    assert "--budgets takes numbers" in error(
        capsys, "plan", "--sizes", "pocket", "--budgets", "big", "--methods", "spectron"
    )
    assert "a sweep needs budgets" in error(capsys, "plan", "--sizes", "pocket", "--methods", "spectron")
    assert "needs --out DIR" in error(capsys, "run", *TINY)
    assert "--cell must be a whole number" in error(capsys, "run", *TINY, "--out", tmp_path / "s", "--cell", "-1")
    assert "--cell is 0 to 5" in error(capsys, "run", *TINY, "--out", tmp_path / "s", "--cell", "6")
    assert "--minutes must be positive" in error(capsys, "run", *TINY, "--out", tmp_path / "s", "--minutes", "0")
    assert "holds no sweep yet" in error(capsys, "run", "--out", tmp_path / "s")
    assert "--ray takes CPU or CPU,GPU" in error(capsys, "run", *TINY, "--out", tmp_path / "s", "--ray", "1,2,3")
    assert not (tmp_path / "s").exists()


def array_task(tmp_path, *flags, code=0, **environment):
    """The batch script of a job array on a Slurm made of shell scripts; what they were told."""
    for name, body in (("scontrol", ""), ("nativerank", f"{environment.pop('body', '')}\nexit {code}")):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\n{body}\n')
        file.chmod(0o755)
    path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / "slurm-array.sbatch"), *flags]
    done = subprocess.run(command, env=environment | path, capture_output=True, text=True, timeout=30)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return done, calls


TASK = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "8"}


def test_a_task_of_the_array_runs_its_cell(tmp_path):
    done, calls = array_task(tmp_path, "--grid", "desk", "--out", "/shared/s", **TASK)
    assert (done.returncode, calls) == (0, ["nativerank scaling run --grid desk --out /shared/s --cell 7"])
    assert array_task(tmp_path, "--out", "x", code=3, **TASK)[0].returncode == 3
    assert "scontrol" not in (tmp_path / "calls").read_text()


def test_a_task_that_is_stopped_goes_back_into_the_queue(tmp_path):
    body = "trap 'exit 143' TERM\nkill -USR1 $PPID\nfor i in {1..100}; do sleep 0.1; done"
    done, calls = array_task(tmp_path, "--out", "x", body=body, **TASK)
    assert done.returncode == 143 and calls[-1] == "scontrol requeue 4711_7"


def test_an_array_wants_a_folder_and_a_number(tmp_path):
    for flags, environment in ((["--grid", "desk"], TASK), (["--out", "x"], {})):
        done, calls = array_task(tmp_path, *flags, **environment)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not calls
