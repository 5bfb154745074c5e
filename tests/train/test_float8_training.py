"""Products in float8, emulated: near the loss of float32, and what is trained and saved is the same kind of thing."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nativerank.hub.load import load
from nativerank.layers.base import factor_linears
from nativerank.methods import build_optimizer, factorize
from nativerank.models import read_hf_config, skeleton
from nativerank.train.float8 import EMULATED, check_device, compute_in_float8
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows

pytest.importorskip("torchao", reason="needs the extra `quantize`")
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(64, 96), nn.Linear(96, 40), nn.Linear(40, 16)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.fixture
def model():
    net = Net()
    factorize(net, "spectron", rank=16, exclude=["head"])
    return net


def test_halves_of_fitting_sizes_are_swapped_and_parameters_stay(model):
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert compute_in_float8(model, CPU, emulate=True) == ["first.up", "first.down", "second.down"]  # 40 is no multiple
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert list(model.state_dict()) == keys and list(factor_linears(model)) == [
        *("first.up", "first.down", "second.up", "second.down")
    ]
    assert [type(m).__name__ for m in (model.first.up, model.second.up, model.head)] == [
        *("Float8Linear", "Linear", "Linear")
    ]
    A, B = model.first.factors()
    assert A is model.first.up.weight and B.shape == (64, 16)


def test_outputs_and_gradients_are_rounded_and_near(model):
    twin = copy.deepcopy(model)
    compute_in_float8(twin, CPU, emulate=True)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    for one in (model, twin):
        one(x).square().mean().backward()
    assert not torch.equal(model(x), twin(x))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 0.2 * p.grad.norm(), name  # two bits of mantissa


def test_training_learns_as_in_float32(model):
    twin = copy.deepcopy(model)
    compute_in_float8(twin, CPU, emulate=True)
    found = []
    for one in (model, twin):
        optimizer = build_optimizer(one, "spectron", lr=0.05, aux_lr=0.01)
        for x in torch.randn(60, 64, 64, generator=torch.Generator().manual_seed(2)):
            optimizer.zero_grad()
            loss = (one(x) - x[:, :16].sin()).square().mean()
            loss.backward()
            optimizer.step()
        found.append(loss.item())
    assert found[0] < 0.3 and found[1] == pytest.approx(found[0], rel=0.1) and found[0] != found[1]


def test_on_the_meta_device_too(tiny_config):
    model = skeleton(read_hf_config(tiny_config))
    factorize(model, "sct", rank=16)
    compute_in_float8(model, CPU, emulate=True)
    assert type(model.model.layers[0].mlp.gate_proj.up).__name__ == "Float8Linear"


RUN = {"rank__value": 16, "train__steps": 6, "train__checkpoint_every": 3, "train__context": 16}


def test_a_run_saves_the_same_folder_and_resumes_bit_for_bit(tmp_path, run_config, listen, crash, fingerprint):
    flags = {**RUN, "train__float8": True, "train__float8_emulate": True}
    train(run_config(out=tmp_path / "plain", **RUN), listen())
    train(run_config(out=tmp_path / "whole", **flags), listen())
    with pytest.raises(crash):
        train(run_config(out=tmp_path / "cut", **flags), listen(crash_after=4))
    train(run_config(out=tmp_path / "cut", resume="auto", **flags), listen())
    assert fingerprint(tmp_path / "cut", 6) == fingerprint(tmp_path / "whole", 6)
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("plain", "whole"))
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
    assert {type(m).__name__ for m in load(tmp_path / "whole/model").modules()} & {"Float8Linear"} == set()
    losses = [[row["loss"] for row in read_rows(tmp_path / name) if "loss" in row] for name in ("plain", "whole")]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], abs=0.05)


def test_what_cannot_be_is_one_line(cli, flags, monkeypatch):
    for changes, said in (
        ({"train__float8": True}, "needs a CUDA GPU of compute capability 8.9 or above, found cpu; " + EMULATED),
        ({"train__float8_emulate": True}, "set --train.float8 true too"),
        ({"train__float8": True, "rank__adapt__threshold": 0.9}, "cannot go with rank.adapt.mode schedule"),
        ({"train__float8": True, "train__float8_emulate": True, "rank__value": 12}, "multiples of 16"),
        ({"train__float8": True, "train__float8_emulate": True, "method": "dense-muon"}, "the model has none"),
    ):
        found = cli("train", *flags(**changes))
        assert found.code == 2 and said in found.err and found.err.splitlines()[-1].startswith("nativerank: error: "), (
            found.err
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"found NVIDIA A100 with 8\.0"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda"))
