"""Another rank: what happens to W, to the factors and to their gradients."""

import pytest
import torch
from torch.testing import assert_close

from nativerank.layers import GuidedLinear, LowRankExperts, LowRankLinear, SpectralLinear
from nativerank.linalg.resize import new_directions, resized_pair

D_IN, D_OUT, RANK = 20, 14, 9
WIDE = {"dtype": torch.float64, "device": "cpu"}


def generator():
    return torch.Generator().manual_seed(1)


def pair_layer(kind=LowRankLinear):
    """Factors with nothing in common: unbalanced, not orthogonal."""
    torch.manual_seed(0)
    layer = kind(D_IN, D_OUT, RANK, **WIDE)
    with torch.no_grad():
        layer.up.weight.copy_(3 * torch.randn(D_OUT, RANK))
        layer.down.weight.copy_(0.1 * torch.randn(RANK, D_IN))
    return layer


def spectral_layer():
    """s of both signs and in no order, as training leaves it."""
    torch.manual_seed(0)
    layer = SpectralLinear(D_IN, D_OUT, RANK, **WIDE)
    with torch.no_grad():
        layer.s.copy_(torch.randn(RANK))
    return layer


def expert_stack():
    torch.manual_seed(0)
    return LowRankExperts(3, D_IN, D_OUT, RANK, **WIDE)


LAYERS = {"lowrank": pair_layer, "spectral": spectral_layer, "experts": expert_stack}
LAYERS["guided"] = lambda: pair_layer(GuidedLinear)
every_kind = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def dense(layer):
    """W in float64, by its definition."""
    A, *s, B = layer.factors()
    return ((A * s[0] if s else A) @ B.mT).detach()


@every_kind
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_shrinking_changes_the_product_by_the_dropped_energy_and_no_more(make, rank):
    layer = make()
    W, spectrum = dense(layer), layer.spectrum()
    layer.resize(rank)
    assert layer.rank == rank
    lost = spectrum[..., rank:].square().sum(-1)
    assert_close(torch.linalg.matrix_norm(W - dense(layer)).square(), lost)
    assert_close(layer.spectrum(), spectrum[..., :rank])


@every_kind
def test_growing_changes_nothing_and_appends(make):
    layer = make()
    W, before = dense(layer), [f.detach().clone() for f in layer.factors()]
    layer.resize(RANK + 4, generator())
    assert layer.rank == RANK + 4
    assert_close(dense(layer), W, rtol=0, atol=1e-15)
    for old, new in zip(before, layer.factors(), strict=True):
        assert torch.equal(new[..., :RANK], old)


@every_kind
def test_what_was_grown_and_not_used_goes_without_a_trace(make):
    layer = make()
    W = dense(layer)
    layer.resize(RANK + 3, generator())
    layer.resize(RANK)
    assert_close(dense(layer), W)


@every_kind
def test_forward_and_declared_matmuls_follow_the_rank(make):
    layer = make()
    layer.resize(4)
    assert {g.n for g in layer.gemms()} >= {4} and {g.k for g in layer.gemms()} >= {4}
    if not isinstance(layer, LowRankExperts | GuidedLinear):
        x = torch.randn(6, D_IN, dtype=torch.float64)
        assert_close(layer(x), x @ dense(layer).mT)
        assert (layer.down.out_features, layer.up.in_features) == (4, 4)


@every_kind
@pytest.mark.parametrize("rank", [0, D_OUT + 1])
def test_a_rank_beyond_the_matrix_is_refused_and_nothing_happens(make, rank):
    layer = make()
    W = dense(layer)
    with pytest.raises(ValueError, match=rf"must be an integer in \[1, {D_OUT}\].*got {rank}"):
        layer.resize(rank)
    assert torch.equal(dense(layer), W)


@every_kind
def test_the_present_rank_is_no_change(make):
    layer = make()
    before = [f.detach().clone() for f in layer.factors()]
    assert layer.resize(RANK) == []
    assert all(torch.equal(a, b) for a, b in zip(before, layer.factors(), strict=True))


@every_kind
def test_parameters_stay_the_same_objects(make):
    layer = make()
    before = [id(p) for p in layer.parameters()]
    layer.resize(4)
    assert [id(p) for p in layer.parameters()] == before
    assert all(p.is_contiguous() and p.is_leaf and p.requires_grad for p in layer.parameters())


def test_a_truncated_pair_is_balanced():
    layer = pair_layer()
    layer.resize(6)
    A, B = layer.factors()
    spectrum = layer.spectrum()
    assert_close(A.mT @ A, torch.diag(spectrum))
    assert_close(B.mT @ B, torch.diag(spectrum))


def test_frames_stay_orthonormal_through_shrinking_and_growing():
    layer = spectral_layer()
    for rank in (5, 12, 3, D_OUT):
        layer.resize(rank, generator())
        U, _, V = layer.factors()
        for Q in (U, V):
            assert_close(Q.mT @ Q, torch.eye(rank, dtype=torch.float64), atol=1e-13, rtol=0)


def test_frames_keep_the_largest_values_in_their_order():
    layer = spectral_layer()
    s, U = layer.s.detach().clone(), layer.up.weight.detach().clone()
    layer.resize(4)
    kept = sorted(s.abs().topk(4).indices.tolist())
    assert torch.equal(layer.s, s[kept]) and torch.equal(layer.up.weight, U[:, kept])


def test_grown_columns_of_a_pair_can_learn():
    """Zero in A, so that W stays; not zero in B, since two zero columns would get no gradient from each other."""
    layer = pair_layer()
    layer.resize(RANK + 3, generator())
    A, B = layer.factors()
    new = B[:, RANK:]
    assert not A[:, RANK:].any()
    size = torch.linalg.matrix_norm(B[:, :RANK]) / RANK**0.5
    assert_close(new.mT @ new, size.square() * torch.eye(3, dtype=torch.float64))
    assert_close(B[:, :RANK].mT @ new, torch.zeros(RANK, 3, dtype=torch.float64), atol=1e-14, rtol=0)
    layer(torch.randn(50, D_IN, dtype=torch.float64)).square().sum().backward()
    assert bool((layer.up.weight.grad[:, RANK:].norm(dim=0) > 0).all())


@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_directions_without_energy_can_learn_too(zero):
    A, B = torch.randn(8, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    if zero in ("A", "both"):
        A[:, 2:] = 0
    if zero in ("B", "both"):
        B[:, 1:] = 0
    first, second = resized_pair(A, B, 3)
    assert_close(first.X @ second.X.mT, A @ B.mT)
    assert bool((second.X.norm(dim=0) > 0.05).all()), "a column that is zero on both sides stays so for good"
    assert bool(torch.isfinite(first.T).all()) and bool(torch.isfinite(second.T).all())


def test_a_zero_matrix_shrinks_without_nan():
    first, second = resized_pair(torch.zeros(8, 4), torch.randn(7, 4), 2)
    assert not first.X.any() and bool((second.X.norm(dim=0) > 0.1).all())


@every_kind
@pytest.mark.parametrize("rank", [5, RANK + 3])
def test_gradients_are_those_of_the_new_factors(make, rank):
    """Against autograd on the resized layer, at the same gradient of W."""
    layer = make()
    G = torch.randn_like(dense(layer))

    def gradients():
        A, *s, B = layer.factors()
        ((A * s[0] if s else A) @ B.mT * G).sum().backward()
        found = [p.grad.clone() for p in (*layer.parameters(),) if p.grad is not None]
        for p in layer.parameters():
            p.grad = None
        return found

    old = gradients()
    trained = [p for p in layer.parameters() if p is not getattr(layer, "guide", None)]
    for p, grad in zip(trained, old, strict=True):
        p.grad = grad
    layer.resize(rank, generator())
    carried = [p.grad.clone() for p in trained]
    for p in trained:
        p.grad = None
    for p, mine, true in zip(trained, carried, gradients(), strict=True):
        old_columns = min(rank, RANK)
        down = p is getattr(layer.down, "weight", layer.down)
        mine, true = (t.mT if down else t for t in (mine, true))
        assert_close(mine[..., :old_columns], true[..., :old_columns])
        assert not mine[..., old_columns:].any(), "nothing is known of new columns"


def test_growth_is_the_generators_and_repeats():
    grown = [pair_layer() for _ in range(3)]
    for layer, seed in zip(grown, (1, 1, 2), strict=True):
        layer.resize(RANK + 2, torch.Generator().manual_seed(seed))
    one, same, other = (layer.down.weight for layer in grown)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_frame_can_be_completed():
    Q, _ = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))
    whole = torch.cat([Q, new_directions(Q, 2)], dim=1)
    assert_close(whole @ whole.mT, torch.eye(6, dtype=torch.float64))


@every_kind
@pytest.mark.parametrize("rank", [3, RANK + 2])
def test_reshape_makes_room_for_numbers_even_where_there_are_none_yet(make, rank):
    layer = make()
    with torch.no_grad():
        layer.down.weight.fill_(torch.nan) if hasattr(layer.down, "weight") else layer.down.fill_(torch.nan)
    layer.reshape(rank)
    assert layer.rank == rank and all(
        rank in p.shape for p in layer.parameters() if p is not getattr(layer, "guide", 0)
    )


@every_kind
def test_a_graph_of_before_does_not_hold_the_next_one_up(make):
    """In the usual loop the last loss is still there when the next one is computed."""
    layer = make()

    def loss():
        A, *s, B = layer.factors()
        return ((A * s[0] if s else A) @ B.mT).square().sum()

    old = loss()
    old.backward()
    seen = []
    for p in layer.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    layer.resize(4)
    new = loss()
    for p in layer.parameters():
        p.grad = None
    new.backward()
    assert old.item() > new.item() and all(4 in shape for shape in seen) and seen
