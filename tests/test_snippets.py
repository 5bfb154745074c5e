"""Every block of Python on a page runs as it stands, one after the other, beside the folders that it speaks of."""

import re
from pathlib import Path

import pytest
import torch

import nativerank as nr
from nativerank.cli.main import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.M | re.S)
PAGES = {
    page.relative_to(ROOT).as_posix(): BLOCK.findall(page.read_text(encoding="utf-8"))
    for page in [ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory, prepared):
    """A folder with the run and the data that pages name."""
    folder = tmp_path_factory.mktemp("scene")
    tiny = "--model.preset pocket --train.steps 2 --train.context 32 --quiet".split()
    assert main(["train", *tiny, "--data.path", str(prepared), "--out", str(folder / "runs" / "a")]) == 0
    (folder / "runs" / "demo-spectron").symlink_to(folder / "runs" / "a")
    (folder / "data").mkdir()
    (folder / "data" / "book").symlink_to(prepared)
    return folder


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    )


def of_convert():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    return {"nr": nr, "config": config, "ViTForImageClassification": ViTForImageClassification}


def of_integrations():
    from nativerank.integrations.hf_trainer import NativerankCallback

    model = small_llama()
    nr.factorize(model)
    optimizer = nr.build_optimizer(model)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")
    return {"nr": nr, "torch": torch, "model": model, "optimizer": optimizer, "NativerankCallback": NativerankCallback}


# What the text around a block brings.
BROUGHT = {"docs/convert.md": of_convert, "docs/integrations.md": of_integrations}


def test_there_are_blocks():
    assert sum(map(len, PAGES.values())) >= 10
    assert BROUGHT.keys() <= {page for page, blocks in PAGES.items() if blocks}


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks])
def test_the_blocks_of_a_page_run(page, scene, tmp_path, monkeypatch, capsys):
    if page == "docs/quantize.md":
        pytest.importorskip("torchao")
    for name in ("runs", "data"):
        (tmp_path / name).symlink_to(scene / name)
    monkeypatch.chdir(tmp_path)
    scope = BROUGHT.get(page, dict)()
    for block in PAGES[page]:
        exec(compile(block, page, "exec"), scope)
