"""Ranks by energy: of the weight where there is one, of its law where there is none."""

import pytest
import torch
from torch import nn

from nativerank.layers import factorize_modules, linear_modules
from nativerank.layers.plan import ByEnergy, lawful_rank, plan_ranks
from nativerank.linalg.energy import energy_rank, kept_energy
from nativerank.linalg.spectrum import singular_values


def stack(device=None):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 160, device=device), nn.Linear(160, 64, device=device), nn.Linear(64, 64, device=device)
    )


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99])
def test_the_law_gives_the_rank_of_a_drawn_matrix(energy):
    for d_in, d_out in ((256, 256), (256, 700), (700, 256)):
        spectrum = singular_values(torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1)))
        assert abs(lawful_rank(d_in, d_out, energy) - energy_rank(spectrum, energy)) <= 2
        assert abs(kept_energy(spectrum, lawful_rank(d_in, d_out, energy)) - energy) < 0.01


def test_shapes_alone_are_planned_by_the_law_and_weights_by_their_own():
    matrices = linear_modules(stack("meta"))
    assert set(map(type, plan_ranks(matrices, energy=0.9).values())) == {int}
    assert plan_ranks(linear_modules(stack()), energy=0.9)["0"] == ByEnergy(0.9, 64)
    drawn = plan_ranks(linear_modules(stack()), energy=0.9, weights=False)
    assert drawn == plan_ranks(matrices, energy=0.9) and drawn["0"] == drawn["1"] != drawn["2"]


def test_a_model_on_the_meta_device_and_sampled_factors_get_the_same_ranks():
    reports = [factorize_modules(stack("meta"), energy=0.7), factorize_modules(stack(), energy=0.7, init="sampled")]
    assert reports[0].ranks == reports[1].ranks
    assert all(entry.kept_energy is None for report in reports for entry in report.entries)


def test_each_weight_gets_the_smallest_rank_that_keeps_the_energy():
    model = stack()
    spectra = {name: singular_values(m.weight) for name, m in linear_modules(model).items()}
    report = factorize_modules(model, energy=0.75)
    assert report.ranks == {name: energy_rank(s, 0.75) for name, s in spectra.items()}
    for entry in report.entries:
        assert entry.kept_energy == pytest.approx(kept_energy(spectra[entry.name], entry.rank))


def test_a_cap_above_full_rank_caps_nothing_and_overrides_win():
    ranks = factorize_modules(stack(), energy=1.0, value=1000, overrides={"2": 7}).ranks
    assert ranks == {"0": 64, "1": 64, "2": 7}
    assert factorize_modules(stack(), energy=1.0, value=5).ranks == {"0": 5, "1": 5, "2": 5}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(energy=0), r"rank energy must lie in \(0, 1\], got 0"),
        (dict(energy=1.01), r"must lie in \(0, 1\], got 1.01"),
        (dict(energy=float("nan")), "got nan"),
        (dict(energy=True), "got True"),
        (dict(energy=0.9, ratio=0.5), "not both: ratio 0.5, energy 0.9"),
        (dict(energy=0.9, value=0), r"rank of 0 must be an integer in \[1, 64\]"),
    ],
)
def test_a_bad_energy_is_one_sentence_and_changes_nothing(options, said):
    model = stack()
    with pytest.raises(ValueError, match=said):
        factorize_modules(model, **options)
    assert all(isinstance(layer, nn.Linear) for layer in model)


def test_progress_names_each_matrix_before_it_is_replaced():
    seen = []
    factorize_modules(stack(), value=3, progress=lambda *facts: seen.append(facts))
    assert seen == [("0", 0, 3), ("1", 1, 3), ("2", 2, 3)]
