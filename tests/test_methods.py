"""Every row of the method table trains, and every parameter is in exactly one group."""

import pytest
import torch
from torch import nn

from nativerank.layers.base import factor_layers
from nativerank.layers.factorize import KINDS
from nativerank.methods import METHODS, SWEPT, build_optimizer, default_rates, factorize, find_method
from nativerank.models import PRESETS, make_hf_config, materialize, skeleton
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows

LOW_RANK = [name for name, row in METHODS.items() if row.layer]
DENSE = [name for name, row in METHODS.items() if not row.layer]


def make(model_type="llama", low_rank: bool | str | None = True, **changes):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    values = {"model_type": model_type, **sizes, "num_key_value_heads": 2, "max_position_embeddings": 32, **changes}
    model = skeleton(make_hf_config(values, "test"))
    if low_rank:
        factorize(model, low_rank if isinstance(low_rank, str) else "spectron", rank_ratio=0.25)
    return materialize(model, 0, 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_in_30_steps(tmp_path, run_config, listen, method):
    summary = train(run_config(out=tmp_path / "run", method=method, train__steps=30, train__batch_size=4), listen())
    losses = [r["loss"] for r in read_rows(tmp_path / "run") if "loss" in r]
    assert max(losses[-5:]) < losses[0] - 0.3 and summary["val_loss"] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (method, kind)
        for method, row in METHODS.items()
        for kind in ("llama", "gpt2", "mixtral", "tied")
        if not (kind == "mixtral" and row.layer and KINDS[row.layer].experts is None)  # refused, see tests/layers
    ],
)
def test_every_parameter_is_in_exactly_one_group(method, kind):
    extra = {
        "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0),
        "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
        "tied": dict(tie_word_embeddings=True),
    }.get(kind, {})
    model = make("llama" if kind == "tied" else kind, METHODS[method].layer and method, **extra)
    optimizer = build_optimizer(model, method, guided_steps=4 if METHODS[method].guided else None)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    hidden, *guides, auxiliary = optimizer.param_groups
    assert bool(guides) == METHODS[method].guided
    names = {id(p): n for n, p in model.named_parameters()}
    rest = [names[id(p)] for p in auxiliary["params"]]
    assert any("embed" in n or "wte" in n for n in rest) and any("norm" in n or "ln_" in n for n in rest)
    assert not any(
        word in names[id(p)] for p in hidden["params"] for word in ("embed", "wte", "norm", "lm_head", "bias")
    )
    if METHODS[method].layer:
        assert len(hidden["params"]) == sum(len(layer.factors()) for layer in factor_layers(model).values())


def test_a_model_without_pairs_fails_loudly():
    for model in (make(low_rank=False), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))):
        for method in LOW_RANK:
            with pytest.raises(
                ValueError, match=f"{method} found no factor pair in the model; call nativerank.factorize"
            ):
                build_optimizer(model, method)


def test_a_dense_method_refuses_factors_and_a_model_without_matrices():
    for method in DENSE:
        with pytest.raises(ValueError, match=r"trains dense matrices, but model\.layers\.0.* is factorized"):
            build_optimizer(make(), method)
        with pytest.raises(ValueError, match="found no hidden matrix"):
            build_optimizer(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), method)


def test_factorize_refuses_a_dense_method_and_two_ranks():
    with pytest.raises(ValueError, match="dense-muon keeps dense matrices"):
        factorize(make(low_rank=False), "dense-muon")
    with pytest.raises(ValueError, match=r"rank or rank_ratio, not both: rank=4, rank_ratio=0\.5"):
        factorize(make(low_rank=False), rank=4, rank_ratio=0.5)


def test_half_a_frozen_pair_is_an_error_and_a_frozen_pair_is_left_out():
    model = make()
    name, layer = next(iter(factor_layers(model).items()))
    layer.up.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=f"{name}: one factor is frozen"):
        build_optimizer(model)
    layer.down.weight.requires_grad_(False)
    grouped = {id(p) for g in build_optimizer(model).param_groups for p in g["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_rates_go_to_their_groups():
    optimizer = build_optimizer(make(), "spectron", lr=0.02, aux_lr=0.004, weight_decay=0.1, nesterov=True)
    hidden, auxiliary = optimizer.param_groups
    assert (hidden["lr"], hidden["weight_decay"], hidden["nesterov"], hidden["rule"]) == (0.02, 0.1, True, "spectron")
    assert (auxiliary["lr"], auxiliary["weight_decay"], auxiliary["rule"]) == (0.004, 0.0, "adamw")
    defaults = build_optimizer(make(), "lowrank-muon").param_groups
    assert (defaults[0]["lr"], defaults[1]["lr"]) == (
        METHODS["lowrank-muon"].rates.lr,
        METHODS["lowrank-muon"].rates.aux_lr,
    )
    assert defaults[0]["nesterov"] is True


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"unknown method 'spectro'; did you mean spectron\?"):
        find_method("spectro")
    with pytest.raises(ValueError, match="unknown optimizer option 'nestrov'"):
        build_optimizer(make(), "spectron", nestrov=True)
    with pytest.raises(ValueError, match=r"spectron's optim\.lr is a bound"):
        build_optimizer(make(), "spectron", lr=1.01)


@pytest.mark.parametrize("preset", [n + d for n in PRESETS for d in ("", "-dense")])
def test_the_default_configuration_of_every_preset_resolves(preset):
    from nativerank.config import ModelConfig, RunConfig
    from nativerank.train.resolve import resolve, tokens_per_step

    config = resolve(RunConfig(model=ModelConfig(preset=preset), out="x", device="cpu"))
    assert resolve(config) == config, "what is written into a run folder means the same when read back"
    t = config.train
    assert t.steps and t.batch_size and t.accumulation and t.context and tokens_per_step(t) > 0
    row = METHODS[config.method]
    assert (row.layer is None) == preset.endswith("-dense")
    rates = default_rates(config.method, preset.removesuffix("-dense"))
    assert (config.optim.lr, config.optim.aux_lr, config.model.init_scale) == (rates.lr, rates.aux_lr, rates.init_scale)
    assert (config.rank.ratio or config.rank.value) or row.layer is None


def test_swept_rates_are_of_presets_and_methods_that_exist():
    for preset, rows in SWEPT.items():
        assert preset in PRESETS and set(rows) <= set(METHODS)
        assert all(rates.lr <= 1 for name, rates in rows.items() if METHODS[name].rule == "spectron")


def test_the_first_spectron_step_stays_below_its_rate():
    """||dW|| <= lr at the first step, W before and after formed in float64."""
    model = make()
    optimizer = build_optimizer(model, "spectron", lr=0.5, norm="exact", orthogonalizer="polar-express")
    before = {n: layer.to_dense().double() for n, layer in factor_layers(model).items()}
    tokens = torch.arange(24).view(2, 12)
    torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    moved = {
        n: torch.linalg.matrix_norm(layer.to_dense().double() - before[n], 2).item()
        for n, layer in factor_layers(model).items()
    }
    assert all(0.1 < m <= 0.5 * 1.05 for m in moved.values()), moved  # five steps reach 1.01 or so, not 1
