"""With a teacher, many processes train as one does; replicas that train on their own have it too."""

import json
import shutil

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401  here once instead of in every child

import nativerank as nr
from nativerank.cli.main import main
from nativerank.models import materialize, read_hf_config, skeleton


def command(rank, words):
    return main(words)


def own_teacher(rank, words, folders):
    """Every process reads a teacher of its own."""
    return main([*words, "--distill.teacher", folders[rank]])


def rows(folder):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["distill_loss"], row["grad_norm"]) for row in found if "loss" in row]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_config):
    """Two folders with different weights."""
    made = [tmp_path_factory.mktemp("teacher") / name for name in ("a", "b")]
    for seed, folder in enumerate(made):
        nr.save(materialize(skeleton(read_hf_config(tiny_config)), seed=7 + seed, init_scale=1.0), folder, "dense")
    return [str(folder) for folder in made]


@pytest.fixture
def words(flags, folders):
    """words(out, **changes): flags of a run with the first teacher."""
    common = {"train__batch_size": 4, "train__accumulation": 2, "distill__weight": 0.7, "distill__temperature": 2.0}
    common |= {"train__steps": 6, "distill__teacher": folders[0], "train__eval_every": 0}
    return lambda out, **changes: ["train", "--quiet", *flags(**(common | changes), out=out)]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_teacher_is_the_same_for_all(launched, words, tmp_path, mode):
    assert main(words(tmp_path / "one")) == 0
    assert launched(command, 2, words(tmp_path / "two", parallel__mode=mode)) == [0, 0]
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6)  # a divergence is a small difference


def test_replicas_on_their_own_learn_from_it_and_resume(launched, words, tmp_path):
    rounds = {"parallel__diloco__every": 2, "train__checkpoint_every": 4, "parallel__replicas": 2}
    assert launched(command, 2, words(tmp_path / "run", **rounds)) == [0, 0]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-000006")
    shutil.rmtree(tmp_path / "again/model")
    assert launched(command, 2, words(tmp_path / "again", **rounds, resume="auto")) == [0, 0]
    found = rows(tmp_path / "run")
    assert rows(tmp_path / "again") == found and found[-1][1] < found[0][1]


def test_different_teachers_are_noticed(launched, words, folders, tmp_path, capfd):
    given = words(tmp_path / "run")
    place = given.index("--distill.teacher")
    del given[place : place + 2]
    assert launched(own_teacher, 2, given, folders) == [2, 2]
    assert "rank 1 has distill.teacher" in capfd.readouterr().err
