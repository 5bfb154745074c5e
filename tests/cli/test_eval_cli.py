"""nativerank eval by its flags: a table, JSON, and one clear line for every mistake."""

import json
import shutil

import pytest

from nativerank.cli.eval import table
from nativerank.evaluate.loss import validation_loss
from nativerank.hub.load import load
from nativerank.hub.save import save
from nativerank.scores import hf_tokenizer
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows
from nativerank.train.trained import open_trained

QUESTION = {"context": "the low rank", "choices": ["matrix", "model learns"], "answer": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.fixture
def trained(run, run_config, listen):
    """A finished run of 8 steps with a checkpoint at 4; made once."""
    if not run.exists():
        train(run_config(out=run, train__checkpoint_every=4, train__keep=9), listen())
    return run


@pytest.fixture
def files(tmp_path):
    (tmp_path / "t.txt").write_text("the low rank matrix model learns language from text\n" * 20)
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTION) + "\n" + json.dumps(QUESTION | {"answer": 1}) + "\n")
    return tmp_path


def test_a_run_alone_is_evaluated_as_its_training_validated_it(trained, cli):
    result = cli("eval", trained, "--json")
    scores = next(iter(json.loads(result.out)["models"].values()))["scores"]
    score = next(iter(scores.values()))
    end = next(row for row in read_rows(trained) if row.get("event") == "end")
    assert score["metrics"]["nats"]["value"] == pytest.approx(end["val_loss"], rel=1e-6)
    assert (score["n"], score["skipped"], score["context"]) == (end["val_tokens"], 1, 16)


def test_several_models_stand_side_by_side(trained, files, cli):
    models = [trained, trained / "checkpoints/step-000004", trained / "model", trained]
    what = ["--data", files / "t.txt", "--cloze", files / "q.jsonl", "--stride", 8, "--context", 16]
    shown = cli("eval", *models, *what)
    assert shown.code == 0 and max(map(len, shown.out.splitlines())) <= 80 and "chance 0.500" in shown.out
    assert cli("eval", *models, *what, "--json", files / "s.json", "--quiet").out == ""
    result = json.loads((files / "s.json").read_text())
    final, early, folder, again = result["models"].values()
    assert final["scores"] == folder["scores"] == again["scores"] != early["scores"]
    assert [early["path"], early["folder"]] == [str(models[1])] * 2
    text = final["scores"][str(files / "t.txt")]
    assert text["text_bytes"] == (files / "t.txt").stat().st_size and (text["context"], text["stride"]) == (16, 8)
    assert final["scores"][str(files / "q.jsonl")]["n"] == 2 and "commit" in result["versions"]
    assert "\n".join(table(result)) + "\n" == shown.out


def test_more_context_is_another_number(trained, files, cli):
    def nats(*extra):
        result = json.loads(cli("eval", trained, "--data", files / "t.txt", "--json", *extra).out)
        return next(iter(result["models"].values()))["scores"][str(files / "t.txt")]["metrics"]["nats"]["value"]

    assert len({nats(), nats("--stride", 4), nats("--context", 64), nats("--eval_tokens", 64)}) == 4


def test_a_model_folder_reads_prepared_data_in_its_own_windows(trained, prepared, cli):
    from nativerank.data.shards import Dataset

    result = cli("eval", trained / "model", "--data.path", prepared, "--split", "train", "--json")
    score = next(iter(json.loads(result.out)["models"].values()))["scores"][str(prepared)]
    own = validation_loss(load(trained / "model"), Dataset.open(prepared).split("train"), 64, 8)
    assert score["metrics"]["nats"]["value"] == pytest.approx(own.nats, rel=1e-9) and score["split"] == "train"


def test_a_folder_reads_alike_wherever_it_lies(trained, files, cli, tmp_path):
    places = [trained / "exported" / "copy", tmp_path / "copy"]
    for place in places:
        shutil.copytree(trained / "model", place)
    result = json.loads(cli("eval", *places, trained / "model", "--data", files / "t.txt", "--json").out)
    assert [next(iter(m["scores"].values()))["context"] for m in result["models"].values()] == [64] * 3
    shutil.rmtree(trained / "exported")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--stride", "17"], "--stride 17 is more than the context, 16"),
        (["--context", "65"], "--context 65 is more than the 64 positions of"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--split", "test"], "--split is train or val, got 'test'"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file or folder"),
        (["--cloze", "nowhere.json"], "--cloze nowhere.json: no such file"),
        (["--include_path", "tasks"], "--include_path says where tasks are; --tasks says which"),
        (["--tasks", " , "], "names no task"),
        (["--tasks", "piqa", "--include_path", "nowhere"], "--include_path nowhere: no such folder"),
        (["--json", "nowhere/s.json"], "there is no folder nowhere"),
        (["--data", "@t.txt", "--limit", "2"], "--limit 2 has no meaning here, it is for questions"),
        (["--cloze", "@q.jsonl", "--eval_tokens", "9"], "--eval_tokens 9 has no meaning here, it is for texts"),
        (["--cloze", "@q.jsonl", "--context", "9"], "--context 9 has no meaning here, it is for texts and tasks"),
        (["--data", "@t.txt", "--split", "val"], "--split val has no meaning here, it is for prepared folders"),
        (["--tasks", "piqa", "--context", "65"], "--context 65 is more than the 64 positions of"),
        (["--step", "5"], "has no checkpoint of step 5; there are: 4, 8"),
        (["--datta", "x"], "--datta"),
    ],
)
def test_mistakes_are_one_line(trained, files, cli, words, message):
    result = cli("eval", trained, *(str(files / word[1:]) if word.startswith("@") else word for word in words))
    assert result.code == 2 and message in result.err.splitlines()[-1], result.err
    assert result.out == ""


def test_all_models_are_looked_at_first_and_what_was_done_is_kept(trained, files, cli, tmp_path):
    words = ["--data", files / "t.txt", "--json", tmp_path / "s.json"]
    short = shutil.copytree(trained / "model", tmp_path / "short")
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:-4])
    result = cli("eval", trained, short, *words)
    assert (result.code, result.err.count("\n"), (tmp_path / "s.json").exists()) == (2, 1, False), result.err
    broken = load(trained / "model")
    broken.lm_head.weight.data.fill_(float("nan"))
    save(broken, tmp_path / "nan")
    shutil.copy(trained / "model/tokenizer.json", tmp_path / "nan")
    result = cli("eval", trained, tmp_path / "nan", *words)
    assert result.code == 2 and "the logits of" in result.err and result.err.count("\n") == 1
    assert len(json.loads((tmp_path / "s.json").read_text())["models"]) == 1


def test_a_damaged_last_row_is_named(trained, cli, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"event": "end"}\n')
    assert "metrics.jsonl is damaged: the row of the end has no step" in cli("eval", run).err


def test_code_of_a_tokenizer_folder_never_runs(trained, tmp_path, monkeypatch):
    folder, ran = shutil.copytree(trained / "model", tmp_path / "evil"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    asks = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(asks))
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    with pytest.raises(ValueError, match=f"cannot read the tokenizer in {folder}: .*custom code") as error:
        hf_tokenizer(open_trained(folder))
    assert not ran.exists() and "\n" not in str(error.value)
    assert hf_tokenizer(open_trained(trained)).encode("the low rank")  # a folder of ours has no code


def test_models_that_cannot_be_evaluated_are_one_line(trained, files, cli, tmp_path, without_validation):
    def refused(message, *words):
        result = cli("eval", *words)
        assert result.code == 2 and message in result.err.splitlines()[-1], result.err

    bare = shutil.copytree(trained / "model", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    refused("holds no tokenizer.json to read", bare, "--data", files / "t.txt")
    refused("holds no tokenizer.json to read", bare, "--cloze", files / "q.jsonl")
    refused("holds no tokenizer.json, so it reads nothing but prepared folders", bare)
    refused("no such folder", trained, tmp_path / "nowhere")
    refused("validation split", bare, "--data", without_validation)
    refused("was made with another tokenizer", trained, "--data", without_validation)
