"""The rank rule: the shapes of the published models, its bounds, and its errors."""

import pytest

from nativerank.layers.rank import break_even_rank, check_rank, rank_from_ratio, rank_warning


@pytest.mark.parametrize(
    "d_in, d_out, rank",
    [
        (768, 768, 192),
        (768, 2048, 192),
        (2048, 768, 512),  # down projection: still below break-even 558.5, so the input size decides
        (1536, 4096, 384),
        (4096, 1536, 1024),
        (8192, 1024, 256),  # a grouped-query key: 2048 is above break-even 910, so min(d) decides
    ],
)
def test_a_quarter_gives_the_ranks_of_the_published_models(d_in, d_out, rank):
    assert rank_from_ratio(0.25, d_in, d_out) == rank
    assert rank_warning(rank, d_in, d_out) is None


@pytest.mark.parametrize("ratio", [1e-9, 0.1, 0.25, 0.5, 0.9, 1.0, 3.0])
@pytest.mark.parametrize("rule", ["auto", "code"])
@pytest.mark.parametrize("d_in, d_out", [(1, 1), (7, 300), (300, 7), (64, 64)])
def test_a_ratio_is_never_an_error_and_never_beyond_full_rank(ratio, rule, d_in, d_out):
    assert 1 <= rank_from_ratio(ratio, d_in, d_out, rule) <= min(d_in, d_out)


def test_the_code_rule_keeps_the_input_size_and_clips():
    assert rank_from_ratio(0.25, 8192, 1024, "code") == 1024
    assert rank_from_ratio(0.25, 8192, 4096, "code") == 2048


@pytest.mark.parametrize("d_in, d_out", [(64, 64), (30, 90), (1, 5)])
def test_a_warning_comes_exactly_when_the_factors_are_not_smaller(d_in, d_out):
    for rank in range(1, min(d_in, d_out) + 1):
        assert (rank_warning(rank, d_in, d_out) is not None) == (rank * (d_in + d_out) >= d_in * d_out)
    assert break_even_rank(64, 64) == 32


@pytest.mark.parametrize("rank", [0, -1, 9, 2.0, True, "4"])
def test_an_explicit_rank_out_of_bounds_names_module_and_bounds(rank):
    with pytest.raises(ValueError, match=r"q_proj.*\[1, 8\]"):
        check_rank(rank, 16, 8, "layers.0.q_proj")


@pytest.mark.parametrize("ratio", [0, -0.1, float("nan"), float("inf"), "a", True])
def test_a_ratio_must_be_a_positive_number(ratio):
    with pytest.raises(ValueError, match=f"positive number, got {ratio!r}"):
        rank_from_ratio(ratio, 8, 8)


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match=r"'magic'.*auto, code"):
        rank_from_ratio(0.5, 8, 8, "magic")
