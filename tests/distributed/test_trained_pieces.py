"""A model from a checkpoint that several processes wrote."""

import pytest
import torch

from nativerank.hub.weights import named_tensors
from nativerank.train.loop import train
from nativerank.train.trained import open_trained


def work(rank, config, listener):
    train(config, listener)


@pytest.mark.parametrize("how", [{"parallel__mode": "fsdp"}, {"parallel__mode": "ddp", "parallel__diloco__every": 4}])
def test_pieces_of_two_processes_are_one_model(launched, run_config, tmp_path, listen, how):
    out = tmp_path / "run"
    launched(work, 2, run_config(out=out, train__checkpoint_every=8, **how), listen())
    assert (out / "checkpoints/step-000008/model-00001-of-00002.safetensors").is_file()
    written, read = named_tensors(open_trained(out).model), named_tensors(open_trained(out, step=8).model)
    assert written.keys() == read.keys() and all(torch.equal(read[name], value) for name, value in written.items())
