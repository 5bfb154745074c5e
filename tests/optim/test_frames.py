"""Rules on orthonormal factors against transcriptions of their formulas, autograd, and the bounds they promise."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nativerank.layers import LowRankLinear, SpectralLinear
from nativerank.linalg.change import update_norm
from nativerank.methods import build_optimizer
from nativerank.optim import frames
from nativerank.optim.frames import aligned_svd

RATES = {"sct": 0.01, "tsvd": 0.01, "stiefel-spectron": 0.1}


class Planted(nn.Module):
    """Two spectral layers in a row and a target: their gradients depend on all factors."""

    def __init__(self, dtype=torch.float64, kind=SpectralLinear, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = (kind(*size, dtype=dtype) for size in ((12, 10, 4), (10, 12, 4)))
        self.x, self.y = torch.randn(64, 12, dtype=dtype), torch.randn(64, 12, dtype=dtype)

    def loss(self, rows=slice(None)):
        return (self.second(self.first(self.x[rows]).tanh()) - self.y[rows]).square().sum() / 64


def layers(model):
    return [m for m in model.modules() if hasattr(m, "factors")]


def train(model, optimizer, steps, pieces=1):
    for _ in range(steps):
        optimizer.zero_grad()
        for piece in torch.arange(64).chunk(pieces):
            model.loss(piece).backward()
        optimizer.step()


def signed_qr(X):
    Q, R = torch.linalg.qr(X)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def error(Q):
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max().item()


def test_sct_is_the_published_step():
    """torch's AdamW on every factor, then QR with the sign fix, one matrix at a time."""
    ours, theirs = Planted(), Planted()
    optimizer = build_optimizer(ours, "sct", lr=0.02, s_lr=0.05, betas=(0.9, 0.999))
    groups = [
        {"params": [p for m in layers(theirs) for p in (m.up.weight, m.down.weight)], "lr": 0.02},
        {"params": [m.s for m in layers(theirs)], "lr": 0.05},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0)
    for _ in range(12):
        train(ours, optimizer, 1)
        train(theirs, adam, 1)
        with torch.no_grad():
            for m in layers(theirs):
                m.up.weight.copy_(signed_qr(m.up.weight))
                m.down.weight.copy_(signed_qr(m.down.weight.mT).mT)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_tsvd_is_autograd_through_qr(monkeypatch):
    """Raw factors trained through a QR in the forward pass, with 4 micro-batches: the same Q over 50 AdamW steps."""
    ours, theirs = Planted(), Planted()

    raw = [
        (m, nn.Parameter(m.up.weight.detach().clone()), nn.Parameter(m.down.weight.mT.detach().clone()))
        for m in layers(theirs)
    ]
    adam = torch.optim.AdamW(
        [p for _, A, B in raw for p in (A, B)] + [m.s for m, *_ in raw], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1
    )
    counted = []
    real = frames.frame_factor
    monkeypatch.setattr(frames, "frame_factor", lambda X, way: counted.append(len(X)) or real(X, way))
    optimizer = build_optimizer(ours, "tsvd", lr=0.02, s_lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)

    def through_qr(rows):
        h = theirs.x[rows]
        for (m, A, B), act in zip(raw, (torch.tanh, lambda t: t), strict=True):
            Q_A, R_A = torch.linalg.qr(A)
            Q_B, R_B = torch.linalg.qr(B)
            U, V = Q_A * R_A.diagonal().sign(), Q_B * R_B.diagonal().sign()
            h = act((h @ V * m.s) @ U.mT)
        return (h - theirs.y[rows]).square().sum() / 64

    for _ in range(50):
        train(ours, optimizer, 1, pieces=4)
        with torch.no_grad():
            ours.loss()  # an evaluation factorizes nothing
        adam.zero_grad()
        for piece in torch.arange(64).chunk(4):
            through_qr(piece).backward()
        adam.step()
    for m, (_, A, B) in zip(layers(ours), raw, strict=True):
        assert_close(m.up.weight, signed_qr(A), rtol=0, atol=1e-11)
        assert_close(m.down.weight.mT, signed_qr(B), rtol=0, atol=1e-11)
    assert sum(counted) == 50 * 4, "one factorization per factor and step"


@pytest.mark.parametrize("method", RATES)
@pytest.mark.parametrize("factor", [1, 20])
def test_frames_stay_orthonormal_in_float32(method, factor):
    model = Planted(torch.float32)
    optimizer = build_optimizer(model, method, lr=min(RATES[method] * factor, 1.0))
    for _ in range(60):
        train(model, optimizer, 1)
        for m in layers(model):
            assert error(m.up.weight) <= 1e-5 and error(m.down.weight.mT) <= 1e-5


@pytest.mark.parametrize("way", ["qr", "cholesky", "polar"])
@pytest.mark.parametrize("method", ["sct", "stiefel-spectron"])
def test_preserve_keeps_the_product_of_the_step(method, way, monkeypatch):
    """W after a preserved retraction is X_U diag(s) X_V^T of the step itself; columns keep their places and signs."""
    model = Planted()
    seen = []
    real = frames.retracted
    monkeypatch.setattr(frames, "retracted", lambda *a: seen.append([x.clone() for x in a[2:5]]) or real(*a))
    optimizer = build_optimizer(model, method, lr=0.02, s_lr=0.02, preserve=True, retraction=way)
    for _ in range(5):
        seen.clear()
        before = [m.up.weight.detach().clone() for m in layers(model)]
        train(model, optimizer, 1)
        for m, (X_U, X_V, s), old in zip(layers(model), seen, before, strict=True):
            assert_close(m.to_dense(), (X_U[0] * s[0]) @ X_V[0].mT, rtol=1e-10, atol=1e-10)
            assert error(m.up.weight) < 1e-12 and error(m.down.weight.mT) < 1e-12
            assert (m.up.weight * old).sum(0).min() > 0.5, "a column changed its place or sign"


def test_preserved_steps_do_not_depend_on_the_retraction():
    """The product after a step is the same for every way; only the basis of the moments may differ afterwards."""
    products = {}
    for way in ("qr", "polar"):
        model = Planted()
        train(model, build_optimizer(model, "sct", lr=0.05, preserve=True, retraction=way), 1)
        products[way] = [m.to_dense() for m in layers(model)]
    for a, b in zip(*products.values(), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_aligned_svd_leaves_a_diagonal_core_alone():
    s = torch.tensor([[0.5, -2.0, 1.0, 0.1]], dtype=torch.float64)
    core = torch.diag_embed(s)
    P, values, Z = aligned_svd(core, s)
    eye = torch.eye(4, dtype=torch.float64)[None]
    for X, wanted in ((P, eye), (Z, eye), (values, s)):
        assert_close(X, wanted)
    noisy = core + 0.01 * torch.randn(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    P, values, Z = aligned_svd(noisy, s)
    assert_close((P * values[..., None, :]) @ Z.mT, noisy)
    assert (P - eye).abs().max() < 0.2 and (values - s).abs().max() < 0.05


def test_riemannian_moments_are_tangent():
    model = Planted()
    optimizer = build_optimizer(model, "sct", lr=0.05, riemannian=True)
    train(model, optimizer, 5)
    for m in layers(model):
        for Q, moment in (
            (m.up.weight, optimizer.state[m.up.weight]["exp_avg"]),
            (m.down.weight.mT, optimizer.state[m.down.weight]["exp_avg"].mT),
        ):
            skew = Q.mT @ moment
            assert_close(skew, -skew.mT, rtol=0, atol=1e-12)
            assert moment.abs().max() > 1e-6


def test_retract_every_third_step():
    model = Planted()
    optimizer = build_optimizer(model, "sct", lr=0.05, retract_every=3)
    errors = []
    for _ in range(6):
        train(model, optimizer, 1)
        errors.append(error(layers(model)[0].up.weight))
    assert [e < 1e-12 for e in errors] == [False, False, True] * 2


def test_one_frame_takes_spectrons_step_and_fixes_the_gauge():

    ours, theirs = Planted(kind=LowRankLinear), Planted(kind=LowRankLinear)
    same = dict(lr=0.1, norm="exact", nesterov=True)
    train(ours, build_optimizer(ours, "stiefel-spectron", frames="one", **same), 1)
    train(theirs, build_optimizer(theirs, "spectron", **same), 1)
    for m, other in zip(layers(ours), layers(theirs), strict=True):
        assert_close(m.to_dense(), other.to_dense(), rtol=1e-10, atol=1e-12)
        assert error(m.down.weight.mT) < 1e-12 < error(other.down.weight.mT)


def test_one_frame_keeps_spectrons_bound_with_norm_of_v_one():

    model = Planted(kind=LowRankLinear)
    optimizer = build_optimizer(model, "stiefel-spectron", frames="one", lr=0.3, certified=True)
    train(model, optimizer, 1)  # takes V into the gauge
    for _ in range(30):
        before = [[f.detach().clone() for f in m.factors()] for m in layers(model)]
        train(model, optimizer, 1)
        for m, (A, V) in zip(layers(model), before, strict=True):
            assert update_norm(A, V, *(f.detach() for f in m.factors())).item() <= 0.3
            assert error(m.down.weight.mT) < 1e-12
            assert_close(torch.linalg.matrix_norm(V, 2), torch.ones((), dtype=V.dtype))
    rho = optimizer.records()["first"]
    assert rho["sigma_B"] == pytest.approx(1, abs=1e-9)


def test_weight_decay_acts_on_s_alone_where_frames_are_retracted():
    for method in ("sct", "stiefel-spectron"):
        model = Planted()
        optimizer = build_optimizer(model, method, lr=0.0, s_lr=0.0, weight_decay=0.5)
        before = [p.clone() for p in model.parameters()]
        train(model, optimizer, 1)
        for p, q in zip(model.parameters(), before, strict=True):
            assert_close(p.detach(), q.detach(), rtol=0, atol=1e-14)
    model = Planted()
    optimizer = build_optimizer(model, "sct", lr=1e-300, s_lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    s = model.first.s.detach().clone()
    optimizer.step()
    assert_close(model.first.s.detach(), s * 0.95)


def test_bad_options_are_named():
    cases = [
        ("sct", dict(retraction="gram"), "optim.retraction must be one of qr, cholesky, polar, cayley, got 'gram'"),
        ("tsvd", dict(retraction="polar"), "optim.retraction must be one of qr, cholesky for tsvd, got 'polar'"),
        ("sct", dict(retraction="cayley", preserve=True), "cayley has no R"),
        ("tsvd", dict(preserve=True), "optim.preserve True has no meaning for the update rule tsvd"),
        ("stiefel-spectron", dict(certified=True, preserve=True), "drop optim.preserve"),
        ("stiefel-spectron", dict(lr=1.5), "must be at most 1"),
        ("sct", dict(retract_every=0), "optim.retract_every must be at least 1, got 0"),
        ("sct", dict(frames="one"), "frames belongs to stiefel-spectron"),
        ("spectron", dict(), "spectron trains factors A B\\^T, but first is U diag"),
    ]
    for method, changes, words in cases:
        with pytest.raises(ValueError, match=words):
            build_optimizer(Planted(), method, **changes)


def test_s_stays_float32_in_a_bf16_model():
    layer = SpectralLinear(8, 6, 3).to(torch.bfloat16)
    assert layer.s.dtype == torch.float32 and layer.up.weight.dtype == torch.bfloat16
    assert layer(torch.zeros(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_one_frame_decays_a():
    model = Planted(kind=LowRankLinear)
    optimizer = build_optimizer(model, "stiefel-spectron", frames="one", lr=0.1, weight_decay=0.5)
    train(model, optimizer, 1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for state in optimizer.state.values():
        state["momentum"].zero_()
    W = model.first.to_dense().detach()
    optimizer.step()
    assert_close(model.first.to_dense().detach(), 0.95 * W)


@pytest.mark.parametrize("way", ["cholesky", "polar"])
def test_one_frame_takes_the_momenta_along(way, monkeypatch):
    """V = X R^-1 and A = A R^T: the gradient of V is G R^T, that of A is G R^-1."""
    seen = []
    real = frames.frame_factor
    monkeypatch.setattr(frames, "frame_factor", lambda *args: seen.append(real(*args)) or seen[-1])
    model = Planted(kind=LowRankLinear)
    choices = dict(frames="one", lr=0.1, retraction=way, momentum=0.9)
    optimizer = build_optimizer(model, "stiefel-spectron", **choices)
    train(model, optimizer, 1)
    R = {X.shape[-2]: r[0] for X, r in seen}
    for m in layers(model):
        r = R[m.in_features]
        assert (r - torch.eye(4, dtype=r.dtype)).abs().max() > 1e-3
        A, V = optimizer.state[m.up.weight]["momentum"], optimizer.state[m.down.weight]["momentum"].mT
        assert_close(A @ r, 0.1 * m.up.weight.grad)
        assert_close(V, 0.1 * m.down.weight.grad.mT @ r.mT)


def test_one_frame_survives_factors_that_lost_their_rank():
    for spoil in (lambda p: p.zero_(), lambda p: p[..., :1].zero_()):
        model = Planted(kind=LowRankLinear)
        with torch.no_grad():
            for m in layers(model):
                spoil(m.up.weight)
                spoil(m.down.weight.mT)
        optimizer = build_optimizer(model, "stiefel-spectron", frames="one", lr=0.1)
        train(model, optimizer, 30)
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(error(m.down.weight.mT) < 1e-10 for m in layers(model))


def test_preserve_with_bad_gradients_is_nan_and_no_crash():
    model = Planted()
    optimizer = build_optimizer(model, "sct", preserve=True)
    train(model, optimizer, 1)
    model.loss().backward()
    model.first.up.weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert model.first.s.isnan().any() and not model.second.s.isnan().any()


def test_a_loaded_triangle_keeps_its_digits_beside_bf16_weights():
    """torch's load_state_dict gives every state the parameter's dtype first; R must not go through bf16."""
    model = Planted(torch.float32).to(torch.bfloat16)
    model.x, model.y = model.x.bfloat16(), model.y.bfloat16()
    optimizer = build_optimizer(model, "tsvd", lr=0.05)
    train(model, optimizer, 5)
    other = build_optimizer(model, "tsvd", lr=0.05)
    other.load_state_dict(optimizer.state_dict())
    for p in (model.first.up.weight, model.second.down.weight):
        R = optimizer.state[p]["R"]
        assert R.dtype == other.state[p]["R"].dtype == torch.float32
        assert torch.equal(R, other.state[p]["R"]) and not torch.equal(R, R.bfloat16().float())
