"""What tests of several rooms share: a cache of their own, a prepared folder, a tiny architecture, a quiet listener."""

import hashlib
import importlib
import json
import math
import os
import random
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

WORDS = (
    "the of and to in a low rank matrix model learns language from text while every token is read once or twice "
    "gradient descent moves thin factors that hold weights under spectral norm bounds"
).split()

# What the extra `dev` installs: where CI=true, a missing one is an error, so that no green run is one of skipped tests.
INSTALLED = {"ctranslate2", "gguf", "lightning", "lm_eval", "peft", "playwright", "ray"}
INSTALLED |= {"tensorboard", "torchao", "trackio", "wandb"}
SKIPPING = pytest.importorskip


def import_or_skip(modname, *args, **options):
    """pytest.importorskip, which skips nothing that CI has to run."""
    if os.environ.get("CI") == "true" and modname.partition(".")[0] in INSTALLED:
        return importlib.import_module(modname)
    return SKIPPING(modname, *args, **options)


pytest.importorskip = import_or_skip


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NATIVERANK_CACHE", str(tmp_path_factory.mktemp("session-cache")))
        yield


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def nobody_launched_this():
    """Trainers of others leave a launcher's variables behind, and then a run takes itself for one process of many."""
    before = {name: os.environ.get(name) for name in LAUNCHED}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def some_text(seed, paragraphs=120):
    source = random.Random(seed)
    return "\n\n".join(" ".join(source.choices(WORDS, k=source.randint(40, 90))) for _ in range(paragraphs))


def make_data(folder, seed=0, vocab=300, **options):
    from nativerank.data.prepare import prepare

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "book.txt").write_text(some_text(seed))
    options = {"val_fraction": 0.05, "chunk_bytes": 700, "workers": 1, "quiet": True} | options
    prepare([str(folder / "book.txt")], folder / "data", f"train:{vocab}", **options)
    return folder / "data"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A small prepared folder; whoever damages something copies it first."""
    return make_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def other_prepared(tmp_path_factory):
    """Another text with another tokenizer."""
    return make_data(tmp_path_factory.mktemp("other-corpus"), seed=1, vocab=280)


@pytest.fixture(scope="session")
def without_validation(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("no-val"), val_fraction=0.0)


TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="session")
def write_hf_config(tmp_path_factory):
    """write_hf_config(**changes): the path of a tiny config.json; a value of None for model_type's own keys stays."""

    def write(**changes):
        values = changes if changes.get("model_type", "llama") != "llama" else TINY | changes
        file = tmp_path_factory.mktemp("config") / "config.json"
        file.write_text(json.dumps(values))
        return str(file)

    return write


@pytest.fixture(scope="session")
def tiny_config(write_hf_config):
    return write_hf_config()


@pytest.fixture(scope="session")
def short_samples():
    """A run ends with 4 tokens of text of its own, not 59, which were a quarter of a tiny run's time."""
    from nativerank.train import closing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closing, "generate", partial(closing.generate, max_new_tokens=4))
        yield


@pytest.fixture
def settings(prepared, tiny_config, short_samples):
    """settings(**changes): dotted keys of a tiny run, with __ for the dots; no change is needed to train 8 steps."""

    def make(**changes):
        base = {
            "data.path": str(prepared),
            "model.config": tiny_config,
            "train.context": 16,
            "train.batch_size": 2,
            "train.accumulation": 1,
            "train.steps": 8,
            "device": "cpu",
        }
        if "init" in changes:  # it brings its architecture along
            del base["model.config"]
        return base | {key.replace("__", "."): value for key, value in changes.items()}

    return make


@pytest.fixture
def run_config(settings):
    """run_config(**changes): the same as a RunConfig."""
    from nativerank.config import RunConfig, from_dict

    def make(**changes):
        nested = {}
        for key, value in settings(**changes).items():
            *groups, name = key.split(".")
            target = nested
            for group in groups:
                target = target.setdefault(group, {})
            target[name] = str(value) if name in ("out", "resume", "init") else value
        return from_dict(RunConfig, nested)

    return make


class Crash(Exception):
    """Stands for a power cut: nothing of ours may see it coming."""


class Listener:
    """Keeps what it was told; crashes after a step if asked to."""

    quiet = True

    def __init__(self, crash_after=None, at_step=None):
        self.rows, self.said, self.facts = [], [], {}
        self.crash_after, self.at_step = crash_after, at_step or {}

    def begin(self, facts):
        self.facts = facts

    def row(self, row):
        self.rows.append(row)
        if "loss" in row:
            self.at_step.get(row["step"], lambda: None)()
            if row["step"] == self.crash_after:
                raise Crash

    def warn(self, message):
        self.said.append(message)


@pytest.fixture
def listen():
    """listen(crash_after=None, at_step=None): a listener for `train`."""
    return Listener


@pytest.fixture
def crash():
    return Crash


@pytest.fixture
def cli(capsys):
    """cli(*words): exit code, stdout and stderr of `nativerank ...` in this process."""
    from nativerank.cli.main import main

    def go(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # --help
            code = stop.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return go


@pytest.fixture
def flags(settings):
    """flags(**changes): the settings of a tiny run as command line words."""

    def make(**changes):
        return [word for key, value in settings(**changes).items() for word in (f"--{key}", str(value))]

    return make


@pytest.fixture(scope="module")
def known_runs():
    return {}


@pytest.fixture
def trained_once(cli, flags, tmp_path_factory, known_runs):
    """trained_once(**changes): the folder of a tiny run, made by the first test of a file that asks for it."""

    def make(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in known_runs:
            folder = tmp_path_factory.mktemp("runs") / "run"
            assert cli("train", *flags(out=folder, **changes)).code == 0
            known_runs[key] = folder
        return known_runs[key]

    return make


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def fingerprint():
    """fingerprint(run, step): hashes of weights and optimizer of a checkpoint, and its state."""

    def make(run, step):
        folder = run / "checkpoints" / f"step-{step:06d}"
        state = json.loads((folder / "state.json").read_text())
        return sha256(folder / "model.safetensors"), sha256(folder / "optimizer.safetensors"), state

    return make


OPTIMUM = {
    **{"spectron": 0.1, "lowrank-adamw": 0.003, "lowrank-muon": 0.03, "dense-adamw": 0.004, "dense-muon": 0.04},
    **{"sct": 0.02, "tsvd": 0.02, "stiefel-spectron": 0.05, "adam-muon": 0.02},
}


def parabola(settings):
    """A loss with its lowest point at OPTIMUM, a little higher for every seed, capped like a plateau."""
    away = math.log(settings["optim.lr"] / OPTIMUM[settings["method"]])
    away += 0.3 * math.log(settings["optim.aux_lr"] / 0.01)
    return 3.0 + min(0.1 * away**2, 2.0) + 0.01 * settings["train.seed"]


@pytest.fixture
def stand_in(monkeypatch):
    """What the cells answer: `loss` of their settings, a float or (exit code, error); `ran` lists them."""
    from nativerank.experiments import grid

    state = SimpleNamespace(ran=[], loss=parabola, rows=lambda settings: [])

    def run(self, command, environment):
        words = command[command.index("train") + 1 :]
        settings = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=False)}
        for key, value in settings.items():
            if re.fullmatch(r"[-+.\de]+", value):
                settings[key] = float(value) if "." in value or "e" in value else int(value)
        state.ran.append(settings)
        answer = state.loss(settings)
        rows = state.rows(settings)
        if rows:
            folder = words[words.index("--out") + 1]
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if isinstance(answer, tuple):
            return *answer[:1], "", f"nativerank: error: {answer[1]}\n"
        steps = settings["train.steps"]
        tokens = {"step": steps, "tokens": steps * 32, "seconds": 2.0, "peak_memory_bytes": 10**8}
        return 0, json.dumps({"val_loss": answer, "bits_per_byte": 1.0, **tokens}), ""

    monkeypatch.setattr(grid.Children, "run", run)
    return state
