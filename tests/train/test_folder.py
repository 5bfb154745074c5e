"""A run folder belongs to one run at a time, and a run that never began leaves none."""

import os
import threading

import pytest

from nativerank.train import loop
from nativerank.train.folder import LOCK, claim
from nativerank.train.loop import train
from nativerank.train.resolve import resolve


@pytest.fixture
def meanwhile(monkeypatch):
    """meanwhile(action): done once, when the next run is about to read its data."""

    def plant(action):
        original, todo = loop.open_data, [action]

        def open_data(*args):
            if todo:
                todo.pop()()
            return original(*args)

        monkeypatch.setattr(loop, "open_data", open_data)

    return plant


def test_two_runs_that_start_at_once_without_out_get_two_folders(tmp_path, run_config, listen, meanwhile, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summaries = []
    meanwhile(lambda: summaries.append(train(run_config(train__steps=2), listen())))
    summaries.append(train(run_config(train__steps=3), listen()))
    assert [s["step"] for s in summaries] == [2, 3]
    assert summaries[0]["out"] == summaries[1]["out"] + "-2"


def test_a_name_that_another_run_took_meanwhile_is_not_used(tmp_path, run_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(run_config())
    for _ in range(2):
        os.makedirs(config.out, exist_ok=True)
        with claim(config, own_name=False) as claimed:
            assert claimed.out == config.out + "-2"
        assert not os.path.exists(claimed.out), "nothing came into it"


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_folder_in_use_is_refused(tmp_path, run_config, cli, flags, listen, meanwhile, resume):
    out, results = tmp_path / "run", []
    meanwhile(lambda: results.append(cli("train", *flags(out=out, resume=resume))))
    listener = listen(at_step={3: lambda: results.append(cli("train", *flags(out=out, resume="auto")))})
    train(run_config(out=out), listener)
    for result in results:
        assert (result.code, result.out) == (2, "")
        assert result.err == f"nativerank: error: {out} is in use by another run\n"
    assert len(results) == 2
    assert train(run_config(out=out, resume="auto"), listen())["step"] == 8, "free again"


@pytest.mark.parametrize("existing", [False, True])
def test_what_fails_before_it_begins_leaves_nothing(tmp_path, run_config, listen, existing):
    out = tmp_path / "a/b/run"
    if existing:
        out.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="not a prepared data folder"):
        train(run_config(out=out, data__path=str(tmp_path / "nowhere")), listen())
    assert sorted(tmp_path.rglob("*")) == before


def test_the_lock_is_on_the_file_that_others_would_find(tmp_path, run_config, monkeypatch):
    """A run that ends without a trace may remove the file that this one has just opened."""
    config, opened = resolve(run_config(out=tmp_path / "run")), []
    original = os.open

    def open_and_lose(path, *args):
        handle = original(path, *args)
        if str(path).endswith(LOCK) and not opened:
            os.unlink(path)
            opened.append(path)
        return handle

    monkeypatch.setattr(os, "open", open_and_lose)
    with claim(config, own_name=True):
        assert opened and (tmp_path / "run" / LOCK).exists()
        with pytest.raises(ValueError, match="in use by another run"), claim(config, own_name=True):
            pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, run_config, monkeypatch):
    import errno
    import fcntl

    def unsupported(*args):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with claim(resolve(run_config(out=tmp_path / "run")), own_name=True):
        pass
    assert not (tmp_path / "run").exists()


# -- started again by torchrun -------------------------------------------------------------------------------------


@pytest.fixture
def restarted(monkeypatch):
    """restarted(): from now on the environment is that of a job which torchrun has started again."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    return lambda: monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_a_job_that_is_started_again_goes_on_by_itself(tmp_path, run_config, listen, crash, fingerprint, restarted):
    straight, again, common = tmp_path / "straight", listen(), dict(train__checkpoint_every=3)
    train(run_config(out=straight, **common), listen())
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "a", **common), listen(crash_after=5))
    with pytest.raises(ValueError, match="already holds a run"):  # not by torchrun
        train(run_config(out=tmp_path / "a", **common), listen())
    restarted()
    train(run_config(out=tmp_path / "a", **common), again)
    assert (again.facts["event"], again.facts["step"]) == ("resume", 3)
    assert fingerprint(tmp_path / "a", 8) == fingerprint(straight, 8)


def test_a_job_that_is_started_again_starts_over_without_a_checkpoint(tmp_path, run_config, listen, crash, restarted):
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "a"), listen(crash_after=2))
    restarted()
    again = listen()
    train(run_config(out=tmp_path / "a"), again)
    assert (again.facts["event"], again.facts["step"]) == ("start", 0)


def test_a_branch_that_is_started_again_goes_on_from_its_own_checkpoint(tmp_path, run_config, listen, crash, restarted):
    common = dict(train__checkpoint_every=3, train__keep=5)
    train(run_config(out=tmp_path / "trunk", **common), listen())
    common |= dict(out=tmp_path / "branch", resume=tmp_path / "trunk/checkpoints/step-000003")
    with pytest.raises(crash):
        train(run_config(**common), listen(crash_after=4))
    restarted()
    again = listen(crash_after=7)
    with pytest.raises(crash):
        train(run_config(**common), again)
    assert again.facts["checkpoint"].endswith("trunk/checkpoints/step-000003")
    again = listen()
    train(run_config(**common), again)
    assert again.facts["checkpoint"].endswith("branch/checkpoints/step-000006")


def test_a_job_that_may_be_started_again_must_name_its_folder(tmp_path, run_config, listen, restarted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"torchrun --max-restarts .* give --out"):
        train(run_config(), listen())
    assert not list(tmp_path.iterdir())


def test_a_job_that_is_started_again_waits_for_the_lock_of_its_predecessor(tmp_path, run_config, restarted):
    config = resolve(run_config(out=tmp_path / "a"))
    predecessor = claim(config, own_name=True)
    predecessor.__enter__()
    with pytest.raises(ValueError, match="in use by another run"), claim(config, own_name=True):
        pass
    restarted()
    end = threading.Timer(0.5, predecessor.__exit__, (None, None, None))
    end.start()
    with claim(config, own_name=True) as claimed:
        assert not end.is_alive() and claimed.resume == "auto"
