"""Every parameter has exactly one role; the rate has the shape its docstring gives."""

import pytest
from torch import nn

from nativerank.optim import assign_roles, multiplier


class Thin(nn.Module):
    def __init__(self, d_in, d_out, r):
        super().__init__()
        self.down, self.up = nn.Linear(d_in, r, bias=False), nn.Linear(r, d_out)

    def factors(self):
        return self.up.weight, self.down.weight.mT


def model():
    return nn.ModuleDict(
        {"embed": nn.Embedding(9, 4), "a": Thin(4, 6, 2), "b": nn.Linear(6, 4), "norm": nn.LayerNorm(4)}
    )


def test_every_parameter_has_exactly_one_role():
    net = model()
    roles = assign_roles(net, ["b.weight"])
    claimed = [n for pair in roles.pairs for n, _ in (pair.up, pair.down)]
    claimed += [n for n, _ in roles.matrices + roles.auxiliary]
    assert sorted(claimed) == sorted(n for n, _ in net.named_parameters())
    assert [p.name for p in roles.pairs] == ["a"] and [n for n, _ in roles.matrices] == ["b.weight"]
    assert {"a.up.bias", "b.bias", "embed.weight", "norm.weight", "norm.bias"} == {n for n, _ in roles.auxiliary}


def test_a_parameter_claimed_twice_is_an_error():
    with pytest.raises(ValueError, match=r"a\.up\.weight belongs to two groups"):
        assign_roles(model(), ["a.up.weight"])


def test_unknown_matrix_and_half_frozen_pair_are_errors():
    with pytest.raises(ValueError, match=r"c\.weight is not a parameter"):
        assign_roles(model(), ["c.weight"])
    net = model()
    net["a"].up.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="a: one factor is frozen"):
        assign_roles(net)


def test_frozen_parameters_have_no_role():
    net = model()
    net["embed"].weight.requires_grad_(False)
    assert "embed.weight" not in {n for n, _ in assign_roles(net).auxiliary}


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_rate_rises_to_one_and_never_leaves_its_range(schedule, steps):
    rates = [multiplier(s, steps, schedule) for s in range(steps)]
    assert max(rates) == 1.0 and min(rates) > 0
    peak = rates.index(1.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    if steps > 2 and schedule != "constant":
        assert rates[-1] == pytest.approx(0.1)


def test_wsd_is_flat_until_its_decay():
    rates = [multiplier(s, 100, "wsd", warmup=0.1, decay=0.2, final_lr=0.0) for s in range(100)]
    assert set(rates[9:80]) == {1.0} and rates[89] == pytest.approx(0.5) and rates[99] == 0


def test_schedule_errors():
    with pytest.raises(ValueError, match="'linear'"):
        multiplier(5, 10, "linear", warmup=0)
    with pytest.raises(ValueError, match=r"warmup must lie in \[0, 1\], got 2"):
        multiplier(0, 10, warmup=2)


def test_steps_beyond_the_end_keep_the_last_rate():
    assert multiplier(99, 10, "cosine") == pytest.approx(multiplier(9, 10, "cosine"))
