"""State in bfloat16: half the bytes, nearly the steps, and squares that fall as they should."""

import copy

import pytest
import torch
from torch import nn

from nativerank.linalg.gram import at_least_float32
from nativerank.methods import METHODS, build_optimizer, factorize, find_method
from nativerank.optim.directions import Stack, adamw_direction
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.precision import keep_squares


def moments(gradients, beta2, narrow):
    """exp_avg_sq after AdamW steps with these gradients (steps, n, d, r)."""
    dtype = torch.bfloat16 if narrow else torch.float32
    shape = gradients.shape[1:]
    state = {name: torch.zeros(shape, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
    state["step"] = torch.zeros(shape[0])
    for G in gradients:
        adamw_direction(Stack(G, state, ()), {"lr": 1.0, "betas": (0.9, beta2), "eps": 1e-8})
    return at_least_float32(state["exp_avg_sq"]), at_least_float32(state["exp_avg"])


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_squares_rise_and_fall_as_in_float32(beta2):
    """To nearest, the fall at 0.999 would not happen at all: the mean would stay 9 times too large."""
    size = torch.cat([torch.full((1500,), 3.0), torch.full((1500,), 1.0)])
    G = torch.randn(3000, 2, 16, 4, generator=torch.Generator().manual_seed(0)) * size[:, None, None, None]
    narrow, wide = (moments(G, beta2, n)[0] for n in (True, False))
    assert (narrow / wide).log().abs().max() < 0.1
    assert (narrow / wide).log().mean().abs() < 0.005


def test_rounding_is_right_on_the_average_of_steps_and_of_elements():
    value = torch.full((1, 64, 32), 1.0 + 0.3 * 2**-7)  # between 1 and the next bfloat16 above it
    seen = []
    for step in range(200):
        kept = torch.empty(1, 64, 32, dtype=torch.bfloat16)
        keep_squares(kept, value, torch.tensor([float(step)]))
        seen.append(kept.float())
    up = (torch.stack(seen) > 1).float()
    assert set(torch.stack(seen).unique().tolist()) == {1.0, 1 + 2**-7}
    assert (up.mean((0, 1)) - 0.3).abs().max() < 0.02, "each element over the steps"
    assert (up.mean((1, 2, 3)) - 0.3).abs().max() < 0.02, "each step over the elements"


def test_rounding_keeps_zero_infinity_and_what_bfloat16_can_hold():
    value = torch.tensor([[0.0, 1.0, 0.5, float("inf"), 3e38, 1e-30]])
    kept = torch.empty(1, 6, dtype=torch.bfloat16)
    keep_squares(kept, value, torch.tensor([7.0]))
    assert kept[0, :4].tolist() == [0.0, 1.0, 0.5, float("inf")]
    torch.testing.assert_close(kept[0, 4:].float(), value[0, 4:], rtol=2**-7, atol=0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.scale = nn.Linear(24, 40), nn.Linear(40, 24), nn.Parameter(torch.ones(24))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale


def trained(method, state_dtype, layerwise=False, steps=30):
    model = Net()
    if find_method(method).layer:
        factorize(model, method, rank=8)
    guided = {"guided_steps": 10} if find_method(method).guided else {}
    options = {"lr": 0.01, "aux_lr": 0.01, "state_dtype": state_dtype, "layerwise": layerwise, **guided}
    optimizer = build_optimizer(model, method, **options)
    X = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(X) - X.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_much_the_same_on_half_the_state(method):
    _, _, wide = trained(method, "fp32")
    model, optimizer, narrow = trained(method, "bf16")
    assert narrow[-1] < narrow[0] and narrow[-1] == pytest.approx(wide[-1], rel=0.03)
    for name, p in model.named_parameters():
        means = {
            optimizer.state[p][key].dtype for key in ("momentum", "exp_avg", "exp_avg_sq") if key in optimizer.state[p]
        }
        assert means == {torch.bfloat16 if p.dim() > 1 else torch.float32}, name


@pytest.mark.parametrize("method", ["sct", "stiefel-spectron", "dense-adamw"])
def test_layerwise_bits_are_the_ordinary_ones(method):
    one, two = trained(method, "bf16"), trained(method, "bf16", layerwise=True)
    assert one[2] == two[2]
    assert all(torch.equal(p, q) for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True))


def test_a_loaded_state_stays_narrow_and_goes_on_with_the_same_bits():
    model, optimizer, _ = trained("lowrank-adamw", "bf16", steps=5)
    twin = copy.deepcopy(model)
    other = build_optimizer(twin, "lowrank-adamw", lr=0.01, aux_lr=0.01, state_dtype="bf16")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        o.zero_grad()
        m(torch.ones(2, 24)).sum().backward()
        o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert value.dtype == other.state[q][key].dtype and torch.equal(value, other.state[q][key])


def test_a_large_parameter_in_pieces_is_the_same_as_whole(monkeypatch):
    weights = []
    for at_once in (1 << 20, 64):
        monkeypatch.setattr("nativerank.optim.directions.WIDE_AT_ONCE", at_once)
        p = nn.Parameter(torch.ones(64, 4))
        optimizer = LowRankOptimizer([{"params": [p], "rule": "adamw", "lr": 0.1, "state_dtype": "bf16"}])
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            p.grad = torch.randn(64, 4, generator=generator)
            optimizer.step()
        assert optimizer.state[p]["step"] == 5
        weights.append(p.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=2e-3)  # the noise differs


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match=r"optim\.state_dtype must be one of fp32, bf16, got 'fp8'"):
        LowRankOptimizer([{"params": [nn.Parameter(torch.ones(2, 2))], "rule": "adamw", "state_dtype": "fp8"}])
