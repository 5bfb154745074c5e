"""LowRankLinear: declared cost, the map it computes, where it starts, and the module it gives back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from nativerank.layers.base import FactorLayer, Gemm
from nativerank.layers.lowrank import LowRankLinear

SHAPES = [(16, 24, 3), (24, 16, 8), (10, 10, 10), (7, 5, 1)]


@pytest.mark.parametrize("d_in, d_out, rank", SHAPES)
def test_declared_gemms_are_what_runs(d_in, d_out, rank):
    layer, tokens = LowRankLinear(d_in, d_out, rank), 11
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, d_in))
    assert counter.get_total_flops() == tokens * sum(g.flops for g in layer.gemms())


def test_a_gemm_counts_two_per_multiply_add_and_scales_with_its_count():
    assert Gemm(3, 5).flops == 30
    assert Gemm(3, 5, count=2).flops == 60


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d_in, d_out, rank", SHAPES)
def test_the_layer_is_the_product_of_its_factors(d_in, d_out, rank, bias):
    layer, x = LowRankLinear(d_in, d_out, rank, bias=bias, dtype=torch.float64), torch.randn(4, d_in).double()
    A, B = layer.factors()
    assert A.shape == (d_out, rank) and B.shape == (d_in, rank) and layer.rank == rank
    assert_close(layer.to_dense(), A @ B.mT)
    assert_close(layer(x), x @ (A @ B.mT).mT + (layer.up.bias if bias else 0))
    assert isinstance(layer, FactorLayer)


def test_factors_share_memory_with_the_parameters():
    layer = LowRankLinear(6, 5, 2)
    with torch.no_grad():
        for factor in layer.factors():
            factor.zero_()
    assert not layer.up.weight.any() and not layer.down.weight.any()


@pytest.mark.parametrize("d_in, d_out, rank", SHAPES)
def test_the_spectrum_is_that_of_the_dense_matrix(d_in, d_out, rank):
    layer = LowRankLinear(d_in, d_out, rank, dtype=torch.float64)
    expected = torch.linalg.svdvals(layer.to_dense())[:rank]
    assert_close(layer.spectrum().detach(), expected.detach(), check_dtype=False)


def test_a_new_layer_starts_with_the_scale_of_a_truncated_linear():
    torch.manual_seed(0)
    dense, layer = nn.Linear(200, 160), LowRankLinear(200, 160, 40, bias=True)
    expected = torch.linalg.svdvals(dense.weight)[:40]
    assert_close(layer.spectrum().float(), expected, rtol=0.08, atol=0.0)  # one random matrix against the mean law
    assert 0 < layer.up.bias.abs().max() <= 200**-0.5


def test_a_new_layer_follows_the_global_seed():
    def weights():
        torch.manual_seed(5)
        return LowRankLinear(8, 8, 4).to_dense()

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize("rank", [0, 6])
def test_rank_out_of_bounds_is_an_error(rank):
    with pytest.raises(ValueError, match=rf"\[1, 5\].*got {rank}"):
        LowRankLinear(8, 5, rank)


def test_device_and_dtype_are_honoured():
    layer = LowRankLinear(8, 6, 2, bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        assert LowRankLinear(8, 6, 2).up.weight.is_meta


def test_names_in_the_state_dict_are_two_linears():
    assert list(LowRankLinear(8, 6, 2, bias=True).state_dict()) == ["down.weight", "up.weight", "up.bias"]


def test_restoring_a_layer_that_replaced_nothing_gives_a_linear():
    layer, x = LowRankLinear(8, 6, 2, bias=True), torch.randn(3, 8)
    dense = layer.restore()
    assert type(dense) is nn.Linear
    assert_close(dense(x), layer(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_can_be_restored(copied):
    dense, x = nn.Linear(8, 6), torch.randn(3, 8)
    layer = LowRankLinear.replacing(dense, 2)
    layer.reset_parameters()
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x))
    assert_close(twin.restore()(x), layer(x))


def test_merging_is_rounded_only_once():
    torch.manual_seed(0)
    layer = LowRankLinear(64, 64, 32, dtype=torch.bfloat16)
    A, B = (f.double() for f in layer.factors())
    assert torch.equal(layer.to_dense(), (A @ B.mT).bfloat16())
