"""Every example runs as it is written, at a small size, and a page of docs/ names it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import nativerank as nr

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """example(name, *words): runs it in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def loss_fell(printed):
    first, last = printed.split("loss ")[-1].split(";")[0].split(" -> ")
    return float(last) < 0.9 * float(first)


def test_plain_pytorch(example):
    printed = example("plain_pytorch.py", "--steps", 12)
    assert "14 matrices" in printed and loss_fell(printed)
    assert nr.load("my-model").model.layers[0].mlp.up_proj.rank == 16


def test_hf_trainer(example):
    assert "checkpoints in my-trainer" in example("hf_trainer.py", "--steps", 4)
    assert steps_logged("my-trainer/checkpoint-4") == [1, 2, 3, 4]
    assert "ranks " in example("hf_trainer.py", "--steps", 8, "--resume")
    resumed = steps_logged("my-trainer/checkpoint-8")
    assert resumed == list(range(1, 9)), "the first four are those of the checkpoint"
    weights = [nr.load(f"my-trainer/checkpoint-{step}").lm_head.weight for step in (4, 6, 8)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def steps_logged(checkpoint):
    rows = json.loads(Path(checkpoint, "trainer_state.json").read_text())["log_history"]
    return [row["step"] for row in rows if "loss" in row]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_lightning_module(example):
    assert "after step 8" in example("lightning_module.py", "--epochs", 1)
    assert "after step 16" in example("lightning_module.py", "--epochs", 2, "--resume", "my-lightning/last.ckpt")
    nr.load("my-lightning/model")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_lora(example):
    printed = example("peft_lora.py", "--steps", 12)
    assert loss_fell(printed) and "trainable params" in printed
    nr.load("my-lora/merged")


def test_every_example_is_in_a_test_and_on_a_page():
    tests, pages = (
        "".join(path.read_text(encoding="utf-8") for path in ROOT.glob(where))
        for where in ("tests/integrations/test_*.py", "docs/*.md")
    )
    for path in sorted(EXAMPLES.iterdir()):
        named = path.name in tests and f"examples/{path.name}" in pages
        assert named or path.name == "__pycache__", path.name
