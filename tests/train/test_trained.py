"""The model of a run, a checkpoint or a model folder, from wherever it lies."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from nativerank.data.tokenizer import tokenizer_hash
from nativerank.hub.load import load
from nativerank.hub.save import save
from nativerank.hub.weights import named_tensors
from nativerank.layers.base import factor_layers
from nativerank.train.loop import train
from nativerank.train.trained import open_trained

SAVES = {"train__checkpoint_every": 3, "train__keep": 9, "train__eval_every": 0}
SHRINK = {
    "rank__adapt__mode": "schedule",
    "rank__adapt__threshold": 0.8,
    "rank__adapt__start": 0.25,
    "rank__adapt__every": 0.25,
    "rank__adapt__min": 2,
    "rank__adapt__multiple": 1,
    "rank__adapt__hysteresis": 0.0,
    "rank__value": 12,
}


def same(one, two):
    one, two = named_tensors(one), named_tensors(two)
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.fixture
def trained(tmp_path_factory, run_config, listen, runs):
    """trained(**changes): a finished run of 8 steps with checkpoints at 3, 6 and 8; each is made once."""

    def make(**changes):
        key = str(sorted(changes.items()))
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("runs") / "run"
            train(run_config(out=runs[key], **SAVES | changes), listen())
        return runs[key]

    return make


@pytest.fixture
def unfinished(trained, tmp_path):
    """A run that was killed after its checkpoint at step 6."""
    run = shutil.copytree(trained(), tmp_path / "killed")
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    return run


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def set_data(run, path):
    lines = (run / "config.yaml").read_text().splitlines()
    assert sum(line.startswith("  path: ") for line in lines) == 1
    (run / "config.yaml").write_text("\n".join(f"  path: {path}" if "  path: " in line else line for line in lines))


CASES = {
    "factors": {},
    "dense": {"method": "dense-adamw"},
    "ranks that changed": SHRINK,
    "a guide that is gone": {"method": "self-guided"},
    "orthonormal factors": {"method": "tsvd"},
    "one orthonormal factor": {"method": "stiefel-spectron", "optim__frames": "one"},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_last_checkpoint_is_the_model_that_the_run_wrote(trained, changes, capsys):
    run = trained(**changes)
    written, read = open_trained(run), open_trained(run, step=8)
    assert written.folder == run / "model" and read.folder.name == "step-000008"
    assert written.label == read.label == f"{run} at step 8"
    assert same(written.model, read.model) and not read.model.training
    assert written.data == read.data is not None
    assert (written.context, written.document_mask) == (read.context, read.document_mask) == (16, False)
    assert read.training == replace(written.training, metrics={}) and read.training.steps == 8
    assert tokenizer_hash(written.tokenizer) == tokenizer_hash(read.tokenizer)
    assert read.model.config.eos_token_id == written.model.config.eos_token_id is not None
    ids = torch.arange(12)[None]
    assert torch.equal(written.model(ids).logits, read.model(ids).logits)
    assert capsys.readouterr().err == ""
    if changes is SHRINK:
        assert len({layer.rank for layer in factor_layers(read.model).values()}) > 1


def test_an_unfinished_run_is_at_its_newest_checkpoint(trained, unfinished, monkeypatch):
    found = open_trained(unfinished)
    assert found.label == f"{unfinished} at step 6" and found.data is not None
    assert same(found.model, open_trained(trained(), step=6).model)
    assert not same(found.model, open_trained(trained()).model)
    monkeypatch.chdir(unfinished / "checkpoints" / "step-000006")
    assert same(open_trained(".").model, found.model)
    direct = open_trained(unfinished / "checkpoints" / "step-000006")
    assert same(direct.model, found.model) and direct.label == found.label


def test_a_run_that_went_on_is_not_what_it_was_when_it_ended(trained, tmp_path, run_config, listen, crash):
    run = shutil.copytree(trained(), tmp_path / "longer")
    with pytest.raises(crash):
        train(run_config(out=run, resume="auto", **SAVES | {"train__steps": 20}), listen(crash_after=10))
    assert open_trained(run).label.endswith("step 9")


def test_a_damaged_checkpoint_is_named_and_passed_by(unfinished):
    flip_a_bit(unfinished / "checkpoints" / "step-000006" / "model.safetensors")
    said = []
    assert open_trained(unfinished, complain=said.append).label.endswith("step 3")
    assert len(said) == 1 and "step-000006 is damaged" in said[0] and "falling back to step-000003" in said[0]
    for path, step in ((unfinished, 6), (unfinished / "checkpoints" / "step-000006", None)):
        with pytest.raises(ValueError, match=r"step-000006 is damaged: the hash of model\.safetensors differs"):
            open_trained(path, step)
    flip_a_bit(unfinished / "checkpoints" / "step-000003" / "model.safetensors")
    with pytest.raises(ValueError, match="no usable checkpoint among 2"):
        open_trained(unfinished)


def test_without_its_data_a_run_has_no_tokenizer(unfinished, other_prepared):
    wanted = open_trained(unfinished).model
    for path, reason in ((unfinished / "gone", "not a prepared data folder"), (other_prepared, "holds other data now")):
        set_data(unfinished, path)
        said = []
        found = open_trained(unfinished, complain=said.append)
        assert same(found.model, wanted) and found.tokenizer is None and found.data is None
        assert len(said) == 1 and said[0].startswith(f"{unfinished} at step 6 has no tokenizer") and reason in said[0]


def test_a_preset_takes_its_vocabulary_from_the_checkpoint(tmp_path, run_config, listen, prepared):
    train(run_config(out=tmp_path / "run", model__config=None, model__preset="pocket", train__steps=1), listen())
    wanted = open_trained(tmp_path / "run", step=1).model
    assert wanted.get_input_embeddings().num_embeddings == 300
    set_data(tmp_path / "run", tmp_path / "gone")
    assert same(open_trained(tmp_path / "run", 1, complain=lambda message: None).model, wanted)


def test_a_run_knows_how_it_read_its_data(trained):
    run = trained(data__document_mask=True)
    for found in (open_trained(run), open_trained(run / "checkpoints/step-000003")):
        assert (found.context, found.document_mask) == (16, True)


def test_guides_that_are_still_there_are_said(trained):
    run = trained(method="self-guided")
    said = "step 3 still has the dense guides of self-guided training.* they are freed at step 4"
    with pytest.raises(ValueError, match=said):
        open_trained(run, step=3)
    assert open_trained(run, step=6).model is not None


def test_a_run_that_began_with_a_model(trained, tmp_path, run_config, listen):
    began = shutil.copytree(trained() / "model", tmp_path / "began")
    train(run_config(out=tmp_path / "run", init=began, **SAVES), listen())
    assert same(open_trained(tmp_path / "run", step=8).model, open_trained(tmp_path / "run").model)
    config = json.loads((began / "config.json").read_text())
    (began / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match=rf"{began} is another model now .*: model\.layers\.0\.mlp.* has shape .* 48"):
        open_trained(tmp_path / "run", step=8)
    shutil.rmtree(began)
    with pytest.raises(ValueError, match=rf"no such folder: {began}; the run began with --init {began}, whose config"):
        open_trained(tmp_path / "run", step=8)
    assert open_trained(tmp_path / "run").model is not None  # its model/ holds all that it needs


def test_model_folders(trained, tmp_path):
    model = open_trained(trained()).model
    save(model, tmp_path / "dense", format="dense")
    found = open_trained(tmp_path / "dense")
    assert found.context is None is open_trained(trained() / "model").context
    assert found.label == str(tmp_path / "dense") and found.tokenizer is None
    assert same(found.model, load(tmp_path / "dense"))
    assert open_trained(trained() / "model").tokenizer is not None


@pytest.mark.parametrize(
    ("name", "step", "said"),
    [
        ("nowhere", None, "no such folder: .*nowhere"),
        ("empty", None, "empty is not a run, a checkpoint or a model folder"),
        ("begun", None, "the run in .*begun has no complete checkpoint yet; continue it with --resume auto"),
        ("killed", 5, "has no checkpoint of step 5; there are: 3, 6"),
        ("killed/checkpoints/step-000006", 6, "is a checkpoint already"),
        ("model", 3, "model is not a run folder, so it has no checkpoint of step 3"),
        ("step-000006", None, "lies in no run folder"),
        ("half/checkpoints/step-000006", None, r"step-000006 is not a complete checkpoint: manifest\.json is missing"),
    ],
)
def test_errors(unfinished, trained, tmp_path, name, step, said):
    (tmp_path / "empty").mkdir()
    shutil.copytree(unfinished, tmp_path / "begun")
    shutil.rmtree(tmp_path / "begun" / "checkpoints")
    shutil.copytree(unfinished, tmp_path / "half")
    (tmp_path / "half" / "checkpoints" / "step-000006" / "manifest.json").unlink()
    shutil.copytree(trained() / "model", tmp_path / "model")
    shutil.copytree(unfinished / "checkpoints" / "step-000006", tmp_path / "step-000006")
    with pytest.raises(ValueError, match=said):
        open_trained(tmp_path / name, step)


def test_a_checkpoint_of_another_model_is_refused(unfinished):
    text = (unfinished / "config.yaml").read_text()
    (unfinished / "config.yaml").write_text(text.replace("method: spectron", "method: dense-adamw"))
    with pytest.raises(ValueError, match=r"step-000006.* lacks model\.layers"):
        open_trained(unfinished)
    state = json.loads((unfinished / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["step"] == 6  # nothing was written
