"""Moments in 8 bits: errors within the codes' steps, right on average, a quarter of the bytes, the same bits."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nativerank.accounting.traffic import held_state_bytes, state_bytes
from nativerank.distributed.grid import SINGLE
from nativerank.methods import build_optimizer, factorize
from nativerank.optim.float8 import BLOCK, decode_mean, decode_squares, encode_mean, encode_squares, spread
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.precision import noise

SHAPES = [(3, 40), (3, 256), (2, 600), (1, 5000)]


def rows(shape, seed=0):
    """Numbers of many sizes, a row of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** (6 * torch.rand(shape, generator=generator) - 5)
    x[0] = 0
    return torch.cat([x, 1e-15 * x.flip(0)])


def at(step, x):
    return noise(torch.tensor([float(step)]), x.shape)[0]


def rounded(v, step):
    return decode_squares(*encode_squares(v, at(step, v)))


def rounded_mean(x, step):
    return decode_mean(*encode_mean(x, at(step, x)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mean_is_off_by_a_step_at_most(shape):
    x = rows(shape)
    codes, scale = encode_mean(x, at(5, x))
    assert codes.shape == x.shape and codes.dtype == torch.uint8 and scale.shape == (len(x), -(-shape[1] // BLOCK))
    step = torch.maximum(x.abs() / 8, spread(scale, shape[1]) * 1.25 * 2**-16)
    assert ((decode_mean(codes, scale) - x).abs() <= step * (1 + 1e-6)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_square_is_off_by_a_step_at_most_and_never_lost(shape):
    v = rows(shape).square()
    v[v < 1e-36] = 0  # float32 itself ends there
    found, scale = rounded(v, 5), encode_squares(v, torch.zeros(v.shape, dtype=torch.int32))[1]
    smallest = spread(scale, shape[1]) * 1.25 * 2**-32
    assert ((found > 0) == (v > 0)).all()
    assert ((found - v).abs() <= torch.maximum(v / 8, smallest) * (1 + 1e-6)).all()


def test_the_largest_of_a_block_is_kept_exactly_and_other_blocks_do_not_matter():
    x = torch.full((1, 2 * BLOCK), 1e-9)
    x[0, :BLOCK] = 1e9
    for back in (rounded_mean(x, 3), rounded(x, 3)):
        assert_close(back, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rounding", [rounded, rounded_mean])
def test_rounding_is_right_on_the_average_of_steps(rounding):
    """To nearest it would be off by up to 0.06, and by everything where a mean is smaller than the smallest."""
    v = torch.rand(1, 500, generator=torch.Generator().manual_seed(0)) + 0.1
    if rounding is rounded_mean:
        v[0, 1::2] *= -1
        v[0, 20:240] *= 1e-4
        v[0, 40:80] *= 0.02  # below the smallest
    mean = torch.stack([rounding(v, step) for step in range(800)]).mean(0)
    assert ((mean - v) / v.abs().clamp_min(2e-5)).abs().max() < 0.005


def embedding(kept, gradients, beta2, lr=0.0):
    """An embedding and its optimizer after AdamW steps with these gradients (steps, rows, columns)."""
    p = nn.Parameter(torch.ones(gradients.shape[1:]))
    group = {"name": "auxiliary", "params": [p], "rule": "adamw", "lr": lr, "betas": (0.9, beta2), "state_dtype": kept}
    optimizer = LowRankOptimizer([group])
    for p.grad in gradients:
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_squares_rise_and_fall_as_in_float32(beta2):
    """Columns that go quiet one after the other: their scale stays, so to nearest they would not fall at 0.999."""
    size = torch.ones(1200, 80, 64)
    size[400:, :, 8:] = 0.2
    gradients = torch.randn(size.shape, generator=torch.Generator().manual_seed(0)) * size
    p, optimizer = embedding("fp8", gradients, beta2)
    q, wide = embedding("fp32", gradients, beta2)
    ratio = (
        decode_squares(optimizer.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq_scale"])
        / (wide.state[q]["exp_avg_sq"])
    )
    assert (ratio.mean() - 1).abs() < 0.03 and ratio.std() < (0.4 if beta2 > 0.99 else 0.1)


def test_a_token_that_is_rare_and_quiet_takes_no_leap():
    """Its mean is there when its gradient is not; with its squares rounded to zero it would move by mean / eps."""
    gradients = torch.zeros(40, 64, 256)
    gradients[:, :, 0] = 1.0  # loud neighbours in its block
    gradients[::10, :, 1:] = 1e-4
    (p, _), (q, _) = (embedding(kept, gradients, 0.95, lr=0.01) for kept in ("fp8", "fp32"))
    assert 0.1 < (q - 1).abs().max() < (p - 1).abs().max() * 1.5 and (p - 1).abs().max() < 1.5 * (q - 1).abs().max()


class Net(nn.Module):
    """Tokens to logits, with a bias and a small matrix beside embedding, factors and head."""

    def __init__(self, tokens=160, width=48):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.head = nn.Embedding(tokens, width), nn.Linear(width, width), nn.Linear(width, 160)
        self.small = nn.Parameter(torch.ones(2, width))

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embed(ids))) * self.small[0])


def trained(kept, layerwise=False, steps=40, method="spectron"):
    model = Net()
    factorize(model, method, rank=8, exclude=["head"])
    options = {"lr": 0.05, "aux_lr": 0.01, "aux_state_dtype": kept, "layerwise": layerwise}
    optimizer = build_optimizer(model, method, **options)
    ids = torch.randint(160, (steps, 64), generator=torch.Generator().manual_seed(1))
    losses = []
    for batch in ids:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), (3 * batch + 1) % 160)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


def test_embedding_and_head_train_alike_in_a_quarter_of_the_bytes():
    _, wide_optimizer, wide = trained("fp32")
    model, optimizer, losses = trained("fp8")
    assert losses[-1] < 0.7 * losses[0] and losses[-1] == pytest.approx(wide[-1], rel=0.02)
    assert losses != wide, "nothing was rounded"
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert (state.get("exp_avg", p).dtype == torch.uint8) == (name in ("embed.weight", "head.weight")), name
        if "exp_avg_scale" in state:
            expected = 2 * p.numel() + 2 * 4 * len(p)  # rows are shorter than a block
            assert sum(v.nbytes for k, v in state.items() if k != "step") == expected < 0.3 * 8 * p.numel()
    for one in (optimizer, wide_optimizer):
        assert held_state_bytes(one) == state_bytes(one.param_groups, one.layout.units, SINGLE)


def test_layerwise_bits_are_the_ordinary_ones():
    one, two = trained("fp8"), trained("fp8", layerwise=True)
    assert one[2] == two[2]
    assert all(torch.equal(p, q) for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True))


def test_a_loaded_state_goes_on_with_the_same_bits():
    model, optimizer, _ = trained("fp8", steps=5)
    twin = copy.deepcopy(model)
    other = build_optimizer(twin, "spectron", lr=0.05, aux_lr=0.01, aux_state_dtype="fp8")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        o.zero_grad()
        m(torch.arange(20)).sum().backward()
        o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert value.dtype == other.state[q][key].dtype and torch.equal(value, other.state[q][key])


def test_many_rows_are_the_same_in_parts(monkeypatch):
    gradients = torch.randn(5, 100, 320, generator=torch.Generator().manual_seed(0))
    whole = embedding("fp8", gradients, 0.999, lr=0.1)
    monkeypatch.setattr("nativerank.optim.float8.WIDE_AT_ONCE", 7 * 320)
    parts = embedding("fp8", gradients, 0.999, lr=0.1)
    assert torch.equal(whole[0], parts[0])
    for key, value in whole[1].state[whole[0]].items():
        assert torch.equal(value, parts[1].state[parts[0]][key]), key


def test_a_gradient_that_is_not_finite_is_not_hidden():
    for bad in (float("nan"), float("inf")):
        gradients = torch.ones(2, 64, 64)
        gradients[0, 3, 3] = bad
        p, _ = embedding("fp8", gradients, 0.95, lr=0.1)
        assert not p[3].isfinite().all() and p[:3].isfinite().all()


def test_matrices_have_no_8_bits_and_unknown_words_are_named():
    model = Net()
    factorize(model, "spectron", rank=8)
    with pytest.raises(ValueError, match=r"optim\.state_dtype must be one of fp32, bf16, got 'fp8'"):
        build_optimizer(model, "spectron", state_dtype="fp8")
    with pytest.raises(ValueError, match=r"optim\.aux_state_dtype must be one of fp32, bf16, fp8, got 'int4'"):
        build_optimizer(model, "spectron", aux_state_dtype="int4")


def test_without_a_word_of_its_own_it_is_state_dtype():
    model = Net()
    factorize(model, "spectron", rank=8)
    optimizer = build_optimizer(model, "spectron", state_dtype="bf16")
    assert {optimizer.state[p]["exp_avg"].dtype for p in (model.embed.weight, model.small)} == {torch.bfloat16}
