"""A sweep on a real Ray: the cells of a local sweep, each once, with the same losses."""

import pytest

from nativerank.cli.main import main
from nativerank.scaling.sources import read_runs

pytestmark = [
    pytest.mark.slow,
    # Ray and its dashboard's libraries warn of their own future.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FLAGS = ["--sizes", "pocket@32x1x2,pocket@64x1x4", "--budgets", "3e9", "--methods", "spectron", "--ratios", "0.25"]


def test_trials_are_cells(tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["scaling", "run", *FLAGS, "--out", str(tmp_path / "local"), "--quiet"]) == 0
    assert main(["scaling", "run", *FLAGS, "--out", str(tmp_path / "ray"), "--cell", "0", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["scaling", "run", "--out", str(tmp_path / "ray"), "--ray", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("val_loss") == 1 and "2 of 2 runs done" in out
    ours, local = (read_runs([tmp_path / name]) for name in ("ray", "local"))
    assert [(run.size, run.loss) for run in ours] == [(run.size, run.loss) for run in local]
