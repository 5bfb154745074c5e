"""A comparison's folder: whose it is, what stays after a kill, how it grows."""

import pytest

from nativerank.experiments.arms import parse_values
from nativerank.experiments.request import REQUEST


def test_interrupted_comparisons_go_on_and_may_grow(ask, stand_in):
    def stop(settings):
        if len(stand_in.ran) > 4:
            raise KeyboardInterrupt
        return 3.0

    stand_in.loss, loss = stop, stand_in.loss
    with pytest.raises(KeyboardInterrupt):
        ask()
    stand_in.loss = loss
    before = len(stand_in.ran)
    ask()
    assert len(stand_in.ran) - before == 12 - 4
    stand_in.ran.clear()
    ask("spectron,lowrank-adamw,lowrank-muon", seeds=3)
    assert len(stand_in.ran) == 3 * 2 + 9, "one more seed of what was there, and the new arm"


@pytest.mark.parametrize("change", [{"settings": {"train__steps": 9}}, {"budget": "flops"}])
def test_a_folder_holds_one_comparison(ask, stand_in, change):
    ask(seeds=1)
    with pytest.raises(ValueError, match=r"holds another comparison, which differs in (train.steps|budget); choose"):
        ask(seeds=1, **change)


def test_a_folder_is_claimed_before_anything_is_written(ask, stand_in, tmp_path, monkeypatch):
    """A kill in the rehearsal, where a study writes model configs, leaves a folder that the same command takes up."""

    def killed(program, comparison):
        (comparison.folder / "configs").mkdir()
        (comparison.folder / "configs" / "d64.json").write_text("{}")
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr("nativerank.experiments.request.rehearse", killed)
        patch.setattr("nativerank.experiments.request.undoing", lambda folder: lambda: None)  # kill -9 runs no handler
        with pytest.raises(SystemExit):
            ask(seeds=1)
    ask(seeds=1)
    assert len(stand_in.ran) == 6


def test_a_folder_with_a_killed_writers_leftover_is_free(ask, stand_in, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{REQUEST}.partial").write_text("{")
    ask(seeds=1)
    assert len(stand_in.ran) == 6


def test_what_failed_before_it_began_takes_away_only_its_own(ask, stand_in, tmp_path):
    bad = {"grid": {"optim.lr": parse_values("--lrs", "2")}}
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="at most 1"):
        ask("spectron", **bad)
    assert list((tmp_path / "out").iterdir()) == []
    ask("spectron", seeds=1)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="at most 1"):
        ask("spectron", **bad)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before and REQUEST in before


def test_a_folder_with_other_things_is_left_alone(ask, stand_in, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="is not empty and holds no comparison"):
        ask()
    assert stand_in.ran == []
    (tmp_path / "out" / REQUEST).write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*request.json"):
        ask()
