"""SpectralLinear: the same map as the factors it was filled with, in the form of a singular value decomposition."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nativerank as nr
from nativerank.layers import FactorLayer, SpectralLinear, factorize_modules, sampled_factors, to_dense_modules
from nativerank.layers.initialize import init_factor_layer
from nativerank.linalg.spectrum import spectral_form


def orthonormal(Q, tolerance):
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max() <= tolerance


@pytest.mark.parametrize("shape", [(9, 7, 4), (7, 9, 7), (5, 5, 1)])
def test_fill_takes_any_product_up_as_its_svd(shape):
    d_out, d_in, r = shape
    A, B = torch.randn(d_out, r, dtype=torch.float64), torch.randn(d_in, r, dtype=torch.float64)
    layer = SpectralLinear(d_in, d_out, r, dtype=torch.float64)
    layer.fill(A, B)
    U, s, V = layer.factors()
    assert_close(layer.to_dense(), A @ B.mT)
    assert orthonormal(U, 1e-12) and orthonormal(V, 1e-12)
    assert_close(s.detach(), torch.linalg.svdvals(A @ B.mT)[:r])
    assert_close(layer.spectrum(), s.detach(), rtol=1e-7, atol=1e-9)
    x = torch.randn(3, d_in, dtype=torch.float64)
    assert_close(layer(x), x @ (A @ B.mT).mT)


def test_spectral_form_of_a_product_that_lost_its_rank():
    A = torch.randn(6, 3, dtype=torch.float64)
    A[:, 2] = A[:, 1]
    B = torch.zeros(5, 3, dtype=torch.float64)
    for right in (torch.randn(5, 3, dtype=torch.float64), B):
        U, s, V = spectral_form(A, right)
        assert orthonormal(U, 1e-12) and orthonormal(V, 1e-12)
        assert_close((U * s) @ V.mT, A @ right.mT)


def test_protocol_members():
    layer = SpectralLinear(8, 6, 3, bias=True)
    assert isinstance(layer, FactorLayer) and layer.rank == 3
    assert [tuple(f.shape) for f in layer.factors()] == [(6, 3), (3,), (8, 3)]
    assert sum(g.flops for g in layer.gemms()) == 2 * 3 * (8 + 6)
    _, s, V = layer.factors()
    assert s.data_ptr() == layer.s.data_ptr() and V.data_ptr() == layer.down.weight.data_ptr()


def test_surgery_there_and_back():
    dense = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    model = copy.deepcopy(dense)
    report = factorize_modules(model, kind="spectral", ratio=1.0, rule="code")
    assert [e.params_after for e in report.entries] == [6 * (8 + 6 + 1), 4 * (6 + 4 + 1)]
    x = torch.randn(5, 8)
    assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    to_dense_modules(model)
    assert_close(model[0].weight, dense[0].weight, rtol=1e-4, atol=1e-5)
    assert type(model[0]) is nn.Linear


def test_random_frames_with_the_norm_of_the_dense_start():
    """SCT's random start with the norm that it names: ||W||_F = std sqrt(d_in d_out), all singular values equal."""
    layer = SpectralLinear(64, 48, 6)
    init_factor_layer(layer, "x", std=0.02, seed=0, init="flat")
    assert_close(layer.s.detach(), torch.full((6,), 0.02 * (64 * 48 / 6) ** 0.5))
    assert layer.to_dense().norm().item() == pytest.approx(0.02 * (64 * 48) ** 0.5, rel=1e-5)
    A, B = sampled_factors(64, 48, 6, 0.02, torch.Generator().manual_seed(0))
    assert (A @ B.mT).norm() < 0.7 * layer.to_dense().norm(), "the truncated start is smaller"


def test_zero_weight_can_learn_in_this_form():
    """U and V are frames, so s gets a gradient: no warning, unlike with two zero factors."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    nn.init.zeros_(model[0].weight)
    assert factorize_modules(copy.deepcopy(model), kind="lowrank").warnings
    assert not factorize_modules(model, kind="spectral").warnings
    model(torch.randn(4, 8)).square().sum().backward()
    assert model[0].s.grad.abs().max() > 0


def test_saved_and_loaded(tmp_path):
    from nativerank.models import make_hf_config, materialize, skeleton

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    model = skeleton(make_hf_config({"model_type": "llama", **sizes, "max_position_embeddings": 32}, "test"))
    nr.factorize(model, "sct", rank=5)
    model = materialize(model, 0, 0.5).eval()
    nr.save(model, tmp_path / "factored")
    nr.save(model, tmp_path / "dense", format="dense")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        loaded = nr.load(tmp_path / "factored")
        assert_close(loaded(ids).logits, wanted, rtol=0, atol=0)
        assert_close(nr.load(tmp_path / "dense")(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert type(loaded.model.layers[0].mlp.up_proj) is SpectralLinear


def test_stacks_of_experts_are_refused():
    from nativerank.models import make_hf_config, skeleton

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = {"model_type": "mixtral", **sizes, "num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match="spectral layers do not cover stacks of experts"):
        nr.factorize(skeleton(make_hf_config(config, "test")), "sct")
