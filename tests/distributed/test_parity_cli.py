"""Many processes train as one does: every method, through the command line, on every kind of grid.

Losses are compared in float32, as anyone trains; weights in float64, where only the order of sums may differ (with a
float64 RMS norm, for that of the architecture rounds to float32).
"""

import itertools
import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from nativerank.cli.main import main
from nativerank.methods import METHODS
from nativerank.train import setup

STEPS = 20
# A tiny Llama; the d_in of down_proj has no 4 equal parts in the second, so this matrix is cut otherwise.
EVEN, UNEVEN = {"intermediate_size": 48}, {"intermediate_size": 50}
COMMON = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": None}
OTHERS = {
    "experts": COMMON
    | {"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "num_local_experts": 3},
    "tied, fused": COMMON
    | {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
VARIANTS = {
    **{name: {"method": name} for name in METHODS},
    "one-frame": {"method": "stiefel-spectron", "optim.frames": "one"},
    "certified": {"method": "spectron", "optim.certified": "true"},
    "capped": {"method": "lowrank-adamw", "optim.update_cap": "0.05"},
}
OPTIONS = {
    "compiled": {"method": "spectron", "compile": "true"},
    "masked, recomputed": {"method": "sct", "data.document_mask": "true", "train.recompute": "up"},
    "kept": {"method": "spectron", "parallel.reshard_after_forward": "false", "train.checkpoint_async": "true"},
}
GRIDS = [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp"), (4, "hsdp")]
ALGEBRAS = {"ddp": ["auto"], "fsdp": ["gram", "owner"], "hsdp": ["gram", "owner"]}


class Float64:
    """Models of double precision, from building to their norms."""

    def __init__(self):
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        new_model = setup._new_model

        def double(*args):
            model, report = new_model(*args)
            return model.double(), report

        def norm(self, x):
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

        self.patch.setattr(setup, "_new_model", double)
        self.patch.setattr(LlamaRMSNorm, "forward", norm)

    def __exit__(self, *_):
        self.patch.undo()


def command(rank, words):
    return main(words)


class Runs:
    """Runs a variant on one process or many; what one process makes is made once."""

    def __init__(self, launched, folder, data, write_config):
        self.launched, self.folder, self.data, self.write_config = launched, folder, data, write_config
        self.made, self.count = {}, itertools.count()

    def __call__(self, variant, model, double, world=1, **flags):
        key = (variant, str(model), double)
        if world == 1 and key in self.made:
            return self.made[key]
        out = self.folder / f"run-{next(self.count)}"
        values = {
            "data.path": self.data,
            "model.config": self.write_config(**model),
            "train.context": 16,
            "train.batch_size": 4,
            "train.accumulation": 2,
            "train.steps": STEPS,
            "train.probe_every": 10,
            "train.eval_every": 10,
            "device": "cpu",
            "out": out,
            **(VARIANTS | OPTIONS)[variant],
            **{f"parallel.{name}": value for name, value in flags.items()},
        }
        words = ["train", "--quiet", *(str(w) for k, v in values.items() for w in (f"--{k}", v))]
        with Float64() if double else nullcontext():
            codes = [main(words)] if world == 1 else self.launched(command, world, words)
        assert codes == [0] * world
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found = rows, load_file(out / "model" / "model.safetensors")
        if world == 1:
            self.made[key] = found
        return found


@pytest.fixture(scope="session")
def runs(launched, tmp_path_factory, prepared, write_hf_config):
    return Runs(launched, tmp_path_factory.mktemp("parity"), prepared, write_hf_config)


def check_losses(runs, variant, world, mode, algebra, model):
    """At every step, in float32."""
    rows, _ = runs(variant, model, False, world, mode=mode, algebra=algebra)
    expected, _ = runs(variant, model, False)
    losses, wanted = ([row["loss"] for row in r if "loss" in row] for r in (rows, expected))
    assert len(losses) == STEPS
    assert losses == pytest.approx(wanted, abs=1e-5, rel=0)


def check_weights(runs, variant, world, mode, algebra, model):
    """At the end, with the validations and figures on the way, in float64."""
    rows, weights = runs(variant, model, True, world, mode=mode, algebra=algebra)
    expected, reference = runs(variant, model, True)
    assert weights.keys() == reference.keys()
    assert all(w.dtype == torch.float64 for w in weights.values())
    assert max((weights[name] - reference[name]).abs().max() for name in reference) < 1e-9
    losses, wanted = ([row["val_loss"] for row in r if "val_loss" in row] for r in (rows, expected))
    assert len(losses) == 2  # after step 10, and of the whole split at the end
    assert losses == pytest.approx(wanted, rel=1e-9)
    assert list(probed(rows)) == pytest.approx(list(probed(expected)), rel=1e-6, abs=1e-9)


def probed(rows):
    """Every figure of every probed matrix, in order."""
    for row in rows:
        for matrix in row.get("probes", {}).values():
            yield from (matrix[key] for key in sorted(matrix))


FAST = [
    ("spectron", 2, "ddp", "gram", EVEN),
    ("stiefel-spectron", 2, "fsdp", "gram", EVEN),
    ("certified", 4, "hsdp", "auto", UNEVEN),
]


@pytest.mark.parametrize(("variant", "world", "mode", "algebra", "model"), FAST)
def test_a_grid_trains_as_one_process(runs, variant, world, mode, algebra, model):
    check_weights(runs, variant, world, mode, algebra, model)


def test_losses_in_float32_are_those_of_one_process(runs):
    check_losses(runs, "lowrank-muon", 2, "fsdp", "owner", EVEN)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("world", "mode", "algebra"), [(n, m, a) for n, m in GRIDS for a in ALGEBRAS[m]])
def test_every_method_on_every_grid(runs, variant, world, mode, algebra):
    model = UNEVEN if world == 4 else EVEN
    check_losses(runs, variant, world, mode, algebra, model)
    check_weights(runs, variant, world, mode, algebra, model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, which its compiler raises and hides
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_engine_change_nothing(runs, option, mode):
    check_losses(runs, option, 2, mode, "auto", EVEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("variant", ["spectron", "lowrank-muon"])
@pytest.mark.parametrize(("world", "mode", "algebra"), [(2, "fsdp", "gram"), (4, "hsdp", "owner"), (2, "ddp", "auto")])
def test_other_architectures(runs, name, variant, world, mode, algebra):
    check_losses(runs, variant, world, mode, algebra, OTHERS[name])
