"""One decomposition: the best approximation, the energy it keeps, and the rank an energy needs."""

import pytest
import torch
from torch.testing import assert_close

from nativerank.linalg.energy import energy_rank, kept_energy
from nativerank.linalg.truncate import decompose

SHAPES = [(40, 40), (24, 60), (60, 24), (1, 7), (7, 1)]


def matrix(d_out, d_in, decay=3.0, dtype=torch.float64):
    """A matrix with geometric singular values down to 10^-decay."""
    g = torch.Generator().manual_seed(d_out)
    U, V = (
        torch.linalg.qr(torch.randn(d, min(d_out, d_in), generator=g, dtype=torch.float64))[0] for d in (d_out, d_in)
    )
    return (U * torch.logspace(0, -decay, min(d_out, d_in), dtype=torch.float64) @ V.mT).to(dtype)


@pytest.mark.parametrize("d_out, d_in", SHAPES)
@pytest.mark.parametrize("decay", [3.0, 12.0])  # the second reaches below what a Gram matrix sees
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_energy_that_is_missing_is_the_distance(d_out, d_in, decay, share):
    W = matrix(d_out, d_in, decay)
    found, rank = decompose(W), max(1, int(share * min(d_out, d_in)))
    A, B = found.factors(rank)
    distance = (W - A @ B.mT).square().sum() / W.square().sum()
    assert_close(1 - kept_energy(found.spectrum, rank), distance.item(), atol=1e-14, rtol=1e-9)
    best = torch.linalg.svdvals(W)[rank:].square().sum() / W.square().sum()  # Eckart-Young
    assert_close(distance, best, atol=1e-15, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_any_precision_are_taken_as_they_are(dtype):
    W = matrix(48, 90, dtype=dtype)
    A, B = decompose(W).factors(48)
    assert_close(A @ B.mT, W.double(), atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("d_out, d_in", SHAPES)
def test_the_rank_of_an_energy_is_the_smallest_that_keeps_it(d_out, d_in):
    spectrum = decompose(matrix(d_out, d_in)).spectrum
    for energy in (1e-9, 0.3, 0.9, 0.95, 0.999, 1.0):
        rank = energy_rank(spectrum, energy)
        assert 1 <= rank <= min(d_out, d_in)
        assert kept_energy(spectrum, rank) >= energy - 1e-12
        assert rank == 1 or kept_energy(spectrum, rank - 1) < energy


def test_energies_and_ranks_are_each_others_inverse():
    spectrum = decompose(matrix(30, 50)).spectrum
    assert [energy_rank(spectrum, kept_energy(spectrum, r)) for r in range(1, 31)] == list(range(1, 31))


def test_all_energy_of_a_matrix_of_low_rank_is_in_its_rank():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(30, 4, generator=g) @ torch.randn(4, 50, generator=g)  # rounded to float32
    assert energy_rank(decompose(W).spectrum, 1.0) == 4


def test_a_zero_matrix_keeps_everything_at_rank_one():
    found = decompose(torch.zeros(6, 9))
    A, B = found.factors(3)
    assert energy_rank(found.spectrum, 0.95) == 1 and kept_energy(found.spectrum, 1) == 1.0
    assert torch.equal(A @ B.mT, torch.zeros(6, 9, dtype=torch.float64))


@pytest.mark.parametrize("energy", [0, -0.1, 1.0001, float("nan"), "much", True])
def test_an_energy_lies_in_0_1(energy):
    with pytest.raises(ValueError, match=r"energy must lie in \(0, 1\], got"):
        energy_rank(torch.ones(3), energy)


def test_a_stack_has_the_rank_of_its_blocks_together():
    spectra = torch.tensor([[4.0, 1.0, 0.0], [3.0, 3.0, 1.0]])
    assert kept_energy(spectra, 1) == pytest.approx(25 / 36) and kept_energy(spectra, 2) == pytest.approx(35 / 36)
    assert energy_rank(spectra, 0.9) == 2
