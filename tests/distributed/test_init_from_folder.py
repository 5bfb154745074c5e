"""A run from the weights of a folder: one process reads them, all have them."""

import json

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401  here once instead of in every child

from nativerank.cli.main import main
from nativerank.train import setup


def command(rank, words):
    """Exit code; the other processes must not read weights."""
    if rank:
        setup.load = None
    return main(words)


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("method", ["spectron", "dense-adamw"])
def test_the_first_process_reads_the_weights_for_all(launched, flags, tmp_path, method):
    own = {"method": method, "train__steps": 3}
    assert main(["train", "--quiet", *flags(**own, out=tmp_path / "first")]) == 0
    alike = flags(**own, init=tmp_path / "first", train__seed=1)
    assert main(["train", "--quiet", *alike, "--out", str(tmp_path / "one")]) == 0
    for mode in ("ddp", "fsdp"):
        words = ["train", "--quiet", *alike, "--parallel.mode", mode, "--out", str(tmp_path / mode)]
        assert launched(command, 2, words) == [0, 0]
        assert losses(tmp_path / mode) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
