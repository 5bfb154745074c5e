"""What a spectrum asks for, and when it is asked."""

from dataclasses import replace

import pytest
import torch

from nativerank.config import AdaptConfig
from nativerank.linalg.energy import energies
from nativerank.rank.energy import foreseen_energy, growth_limit, next_rank
from nativerank.rank.schedule import DEFAULT_THRESHOLD, due, resolve_adapt

ADAPT = AdaptConfig(mode="schedule", threshold=0.9, min=1, multiple=1, hysteresis=0.0, grow=0.5)
NOBODY = 10**6


def spectrum(*squares):
    """Singular values with these energies."""
    return torch.tensor(squares, dtype=torch.float64).sqrt()


def decayed(rank, rate):
    return spectrum(*(rate**i for i in range(rank)))


@pytest.mark.parametrize(("threshold", "rank"), [(0.5, 1), (0.74, 1), (0.76, 2), (0.96, 3), (1.0, 4)])
def test_the_smallest_rank_that_keeps_the_threshold(threshold, rank):
    s = spectrum(75, 20, 4, 1)
    assert next_rank(s, 4, replace(ADAPT, threshold=threshold)) == rank


def test_a_new_rank_is_a_multiple_and_not_below_the_least():
    s = spectrum(100, *[1e-6] * 15)
    assert next_rank(s, 16, replace(ADAPT, multiple=4)) == 4
    assert next_rank(s, 16, replace(ADAPT, multiple=4, min=7)) == 8
    assert next_rank(s, 16, replace(ADAPT, min=99)) == 16


def test_hysteresis_is_a_dead_band_below_the_rank_but_not_for_a_choice_made_once():
    s = spectrum(*[1.0] * 9, 1e-9)
    assert next_rank(s, 10, replace(ADAPT, threshold=0.99)) == 9
    assert next_rank(s, 10, replace(ADAPT, threshold=0.99, hysteresis=0.2)) == 10
    assert next_rank(s, 10, replace(ADAPT, threshold=0.99, hysteresis=0.2, mode="once")) == 9


def test_flat_spectra_grow_decayed_and_half_empty_ones_do_not():
    assert next_rank(spectrum(*[1.0] * 8), NOBODY, ADAPT) == 12
    assert next_rank(decayed(8, 0.6), NOBODY, replace(ADAPT, threshold=0.97, hysteresis=0.2)) == 8
    assert next_rank(spectrum(*[1.0] * 8, *[1e-12] * 4), NOBODY, replace(ADAPT, hysteresis=0.5)) == 12


def test_growth_stops_at_its_limit_and_at_zero_never_begins():
    flat = spectrum(*[1.0] * 8)
    assert next_rank(flat, 10, ADAPT) == 10
    assert next_rank(flat, 8, ADAPT) == 8
    assert next_rank(flat, NOBODY, replace(ADAPT, grow=0.0)) == 8
    assert next_rank(flat, NOBODY, replace(ADAPT, grow=0.01, multiple=4)) == 12


@pytest.mark.parametrize("rate", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("block", [1, 3, 6])
def test_geometric_decay_is_foreseen_exactly(rate, block):
    whole = decayed(30, rate)
    true = whole.square()[:12].sum() / whole.square().sum()
    assert foreseen_energy(energies(whole[:12]), 30, block) == pytest.approx(true.item())


@pytest.mark.parametrize("threshold", [0.9, 0.97, 0.999])
@pytest.mark.parametrize("rate", [0.6, 0.8, 0.9])
def test_both_rules_agree_about_one_matrix_whichever_side_they_come_from(rate, threshold):
    full = decayed(64, rate)
    adapt = replace(ADAPT, threshold=threshold, grow=0.1)
    down = next_rank(full, 64, adapt)
    rank = 4
    while (up := next_rank(full[:rank], 64, replace(adapt, hysteresis=0.9))) > rank:
        rank = up
    assert abs(rank - down) <= 2


def test_a_stack_is_read_as_one_block_diagonal_matrix():
    stack = torch.stack([spectrum(90, 5, 5), spectrum(1, 0, 0)])
    assert next_rank(stack, 3, ADAPT) == 1
    assert next_rank(stack, 3, replace(ADAPT, threshold=0.93)) == 2


def test_a_zero_matrix_stays_or_shrinks_to_the_least():
    assert next_rank(torch.zeros(8), 8, replace(ADAPT, min=4)) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spectrum_that_is_not_finite_names_its_matrix(value):
    with pytest.raises(ValueError, match=r"^layers\.3\.up: a factor holds NaN or infinity"):
        next_rank(torch.tensor([1.0, value]), 2, ADAPT, "layers.3.up")


@pytest.mark.parametrize("shape", [(64, 64), (128, 352), (100, 20), (3, 3), (1, 50)])
def test_a_matrix_does_not_grow_to_where_factors_save_nothing_unless_told(shape):
    d_in, d_out = shape
    limit = growth_limit(d_in, d_out, None)
    assert limit * (d_in + d_out) < d_in * d_out <= (limit + 1) * (d_in + d_out)
    assert growth_limit(d_in, d_out, 40) == min(40, d_in, d_out)


def test_looks_are_a_function_of_the_step():
    adapt = AdaptConfig(mode="schedule", threshold=0.9, start=0.1, every=0.25, until=0.8)
    assert [step for step in range(1, 101) if due(adapt, step, 100)] == [10, 35, 60]
    assert [step for step in range(1, 101) if due(replace(adapt, mode="once"), step, 100)] == [10]
    assert not any(due(AdaptConfig(), step, 100) for step in range(101))
    assert [step for step in range(0, 5) if due(replace(adapt, start=0.0, every=0.0), step, 4)] == [1, 2, 3]


def test_looks_wait_for_the_next_meeting_of_replicas():
    adapt = replace(ADAPT, start=0.1, every=0.25, until=0.8)
    assert [step for step in range(1, 101) if due(adapt, step, 100, 20)] == [20, 60]
    assert [step for step in range(1, 101) if due(replace(adapt, mode="once"), step, 100, 30)] == [30]
    assert [step for step in range(1, 101) if due(adapt, step, 100, 1)] == [10, 35, 60]


def test_a_threshold_alone_is_a_schedule_and_a_mode_alone_the_default_threshold():
    assert resolve_adapt(AdaptConfig(threshold=0.9)).mode == "schedule"
    assert resolve_adapt(AdaptConfig(mode="once")).threshold == DEFAULT_THRESHOLD
    assert resolve_adapt(AdaptConfig()) == AdaptConfig()
    once = resolve_adapt(AdaptConfig(mode="once", threshold=0.9))
    assert resolve_adapt(once) == once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0.0}, r"rank\.adapt\.threshold must lie in \(0, 1\], got 0\.0"),
        ({"threshold": 1.1}, r"rank\.adapt\.threshold .* got 1\.1"),
        ({"threshold": 0.9, "start": 1.5}, r"rank\.adapt\.start must be in \[0, 1\], got 1\.5"),
        ({"threshold": 0.9, "multiple": 0}, r"rank\.adapt\.multiple must be at least 1, got 0"),
        ({"threshold": 0.9, "max": 0}, r"rank\.adapt\.max must be at least 1, got 0"),
        ({"threshold": 0.9, "until": 0.05}, r"rank\.adapt\.until 0\.05 lies before rank\.adapt\.start 0\.1"),
        ({"threshold": 0.9, "min": 9, "max": 8}, r"rank\.adapt\.min 9 is beyond rank\.adapt\.max 8"),
        ({"mode": "once", "every": 0.1}, r"rank\.adapt\.every 0\.1 has no meaning while rank\.adapt\.mode is once"),
        ({"mode": "once", "until": 0.9}, r"rank\.adapt\.until 0\.9 has no meaning while rank\.adapt\.mode is once"),
        ({"mode": "once", "hysteresis": 0.0}, r"rank\.adapt\.hysteresis 0\.0 has no meaning while .* is once"),
        ({"min": 4}, r"rank\.adapt\.min 4 has no meaning while rank\.adapt\.mode is off"),
        ({"mode": "off", "threshold": 0.9}, r"rank\.adapt\.threshold 0\.9 has no meaning while"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve_adapt(AdaptConfig(**changes))
    assert "\n" not in str(error.value)


def test_compiled_blocks_are_refused():
    with pytest.raises(ValueError, match=r"drop --compile or rank\.adapt"):
        resolve_adapt(AdaptConfig(threshold=0.9), compiled=True)
