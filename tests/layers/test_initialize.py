"""Both initialisations: best approximation, the law of Gaussian matrices, and seeds by name."""

import pytest
import torch
from torch.testing import assert_close

from nativerank.layers.experts import LowRankExperts
from nativerank.layers.initialize import (
    dense_init,
    gaussian_spectrum,
    haar_frame,
    init_factor_layer,
    init_seed,
    initial_factors,
    sampled_factors,
    truncated_svd,
)
from nativerank.layers.lowrank import LowRankLinear

SHAPES = [(96, 96), (64, 160), (160, 64), (300, 30)]  # d_in, d_out


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("d_in, d_out", SHAPES)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_truncation_is_the_best_approximation(d_in, d_out, share):
    W = torch.randn(d_out, d_in, generator=generator(), dtype=torch.float64)
    rank = int(share * min(d_in, d_out))
    A, B = truncated_svd(W, rank)
    tail = torch.linalg.svdvals(W)[rank:]  # Eckart-Young: no rank-r matrix is closer, in either norm
    assert_close((W - A @ B.mT).square().sum(), tail.square().sum(), atol=1e-9, rtol=1e-9)
    if rank < min(d_in, d_out):
        assert_close(torch.linalg.matrix_norm(W - A @ B.mT, ord=2), tail[0])


def test_truncation_balances_the_factors_and_fixes_signs():
    W = torch.randn(40, 24, generator=generator())
    A, B = truncated_svd(W, 6)
    S = torch.linalg.svdvals(W)[:6].diag()
    assert_close(A.mT @ A, S, atol=1e-5, rtol=1e-5)  # float32 sums over 40 rows
    assert_close(B.mT @ B, S, atol=1e-5, rtol=1e-5)
    assert (A.gather(0, A.abs().argmax(dim=0, keepdim=True)) > 0).all()
    A_again, B_again = truncated_svd(W.clone(), 6)
    assert torch.equal(A, A_again) and torch.equal(B, B_again)


def test_truncation_computes_in_float32_at_least():
    W = torch.randn(32, 32, generator=generator()).bfloat16()
    A, B = truncated_svd(W, 32)
    assert A.dtype == B.dtype == torch.float32
    assert_close(A @ B.mT, W.float(), atol=1e-5, rtol=1e-5)


def test_zero_and_non_finite_weights():
    A, B = truncated_svd(torch.zeros(5, 4), 2)
    assert torch.equal(A @ B.mT, torch.zeros(5, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        truncated_svd(torch.full((5, 4), torch.nan), 2)


@pytest.mark.parametrize("d_in, d_out", SHAPES)
def test_quantiles_match_the_mean_spectrum_of_random_matrices(d_in, d_out):
    rank, std = min(d_in, d_out) // 4, 0.02
    draws = torch.randn(40, d_out, d_in, generator=generator(), dtype=torch.float64) * std
    mean = torch.linalg.svdvals(draws).mean(dim=0)[:rank]
    predicted = gaussian_spectrum(d_in, d_out, rank, std)
    assert_close(predicted, mean, rtol=0.03, atol=0.0)  # finite size: the edge moves by O(min(d)^-2/3)
    assert (predicted[:-1] >= predicted[1:]).all()


@pytest.mark.parametrize("d_in, d_out", SHAPES)
def test_all_quantiles_carry_the_energy_of_the_whole_matrix(d_in, d_out):
    full = gaussian_spectrum(d_in, d_out, min(d_in, d_out), 1.0)
    assert_close(full.square().sum().item(), float(d_in * d_out), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("d_in, d_out", SHAPES)
def test_sampled_and_svd_have_the_same_spectrum_and_output_variance(d_in, d_out):
    rank, std = min(d_in, d_out) // 4, 0.05
    W_svd, W_sampled = (
        A.double() @ B.double().mT
        for A, B in (initial_factors("w", d_in, d_out, rank, std, 0, init) for init in ("svd", "sampled"))
    )
    spectra = [torch.linalg.svdvals(W)[:rank] for W in (W_svd, W_sampled)]
    assert_close(spectra[0], spectra[1], rtol=0.08, atol=0.0)  # one draw fluctuates at the edge
    assert_close(W_svd.norm(), W_sampled.norm(), rtol=0.03, atol=0.0)
    x = torch.randn(d_in, 2000, generator=generator(1), dtype=torch.float64)
    assert_close((W_svd @ x).var(), (W_sampled @ x).var(), rtol=0.05, atol=0.0)


def test_sampled_factors_are_balanced_frames():
    A, B = sampled_factors(50, 70, 8, 0.1, generator())
    S = gaussian_spectrum(50, 70, 8, 0.1).float().diag()
    assert_close(A.mT @ A, S, atol=1e-5, rtol=1e-5)
    assert_close(B.mT @ B, S, atol=1e-5, rtol=1e-5)


def test_frames_are_haar():
    # Under Haar every entry has mean 0 and variance 1/d, column signs included; raw LAPACK QR has a biased diagonal.
    frames = torch.stack([haar_frame(6, 6, generator(seed)) for seed in range(3000)])
    assert_close(frames.mT @ frames, torch.eye(6).expand(3000, 6, 6), atol=1e-5, rtol=0.0)
    assert frames.mean(dim=0).abs().max() < 0.035  # 4.7 standard errors
    assert_close(frames.square().mean(dim=0), torch.full((6, 6), 1 / 6), atol=0.02, rtol=0.0)


def test_seeds_come_from_names_and_are_stable():
    assert init_seed(0, "a") != init_seed(0, "b") != init_seed(1, "b")
    assert init_seed(0, "model.layers.0.mlp.up_proj") == 3668918913418277810  # must never change: runs depend on it
    assert all(0 <= init_seed(s, "x") < 2**63 for s in range(100))


def test_dense_init_depends_on_name_and_seed_only():
    W = dense_init("w", 30, 40, 0.5, seed=3)
    torch.manual_seed(99)
    assert torch.equal(W, dense_init("w", 30, 40, 0.5, seed=3)) and W.dtype == torch.float32
    assert not torch.equal(W, dense_init("v", 30, 40, 0.5, seed=3))
    assert_close(W.std().item(), 0.5, rtol=0.1, atol=0.0)


def test_svd_starts_a_layer_as_the_truncated_dense_init():
    layer = LowRankLinear(24, 36, 24)
    init_factor_layer(layer, "w", std=0.1, seed=7)
    assert_close(layer.to_dense(), dense_init("w", 36, 24, 0.1, 7), atol=1e-6, rtol=1e-5)  # full rank: nothing is cut


@pytest.mark.parametrize("init", ["svd", "sampled"])
def test_experts_start_independently_and_by_name(init):
    stack = LowRankExperts(3, 12, 20, 4)
    init_factor_layer(stack, "experts.up", std=0.1, seed=7, init=init)
    alone = LowRankLinear(12, 20, 4)
    init_factor_layer(alone, "experts.up.2", std=0.1, seed=7, init=init)
    assert torch.equal(stack.to_dense()[2], alone.to_dense())
    assert not torch.equal(stack.to_dense()[0], stack.to_dense()[1])


def test_an_unknown_initialisation_is_named():
    with pytest.raises(ValueError, match=r"'xavier'.*svd, sampled"):
        init_factor_layer(LowRankLinear(4, 4, 2), "w", 0.1, 0, init="xavier")
