"""Under Lightning, with the module of examples/: resumed = uninterrupted, bit for bit."""

import runpy
from pathlib import Path

import pytest
import torch

import nativerank as nr
from nativerank.layers import guided_layers

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_module.py"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def train():
    """train(epochs, out, resume, **options), of eight steps an epoch."""
    return runpy.run_path(str(EXAMPLE))["train"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("spectron", {}),
        ("sct", {}),
        ("self-guided", {"guided_steps": 5, "lr": 5e-3}),  # gone at the checkpoint after step 8
        ("self-guided", {"guided_steps": 12, "lr": 5e-3}),  # gone after it
    ],
)
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(train, tmp_path, method, options):
    whole = train(2, tmp_path / "whole", method=method, **options)
    resumed = train(2, tmp_path / "resumed", tmp_path / "whole" / "epoch=0.ckpt", method=method, **options)
    weights, again = (trainer.lightning_module.state_dict() for trainer in (whole, resumed))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    assert whole.global_step == resumed.global_step == 16
    assert whole.callback_metrics["loss"] == resumed.callback_metrics["loss"] < 3.5  # from log(64) = 4.16
    assert all(layer.guide is None for layer in guided_layers(whole.lightning_module).values())
    rates = [[group["lr"] for group in trainer.optimizers[0].param_groups] for trainer in (whole, resumed)]
    assert rates[0] == rates[1] and rates[0][0] == options.get("lr", 0.05)


def test_ranks_that_changed_are_in_the_checkpoint(train, tmp_path):
    trainer = train(1, tmp_path)
    module = trainer.lightning_module
    layer = module.model.model.layers[0].mlp.up_proj
    trainer.optimizers[0].resize(layer.resize(5))
    trainer.save_checkpoint(tmp_path / "changed.ckpt")
    fresh = type(module)()
    fresh.load_state_dict(torch.load(tmp_path / "changed.ckpt", weights_only=True)["state_dict"])
    assert fresh.model.model.layers[0].mlp.up_proj.rank == 5
    resumed = train(2, tmp_path, tmp_path / "changed.ckpt")
    assert resumed.lightning_module.model.model.layers[0].mlp.up_proj.rank == 5
    nr.save(resumed.lightning_module.model, tmp_path / "model")
    assert nr.load(tmp_path / "model").model.layers[0].mlp.up_proj.rank == 5
