"""The outer step of one matrix in float64, against dense products, torch.optim.SGD and its own symmetries."""

import pytest
import torch
from torch.testing import assert_close

from nativerank.optim.outer_rules import FRAME, PAIR, PLAIN, TRIPLE, Sgd, agree

AVERAGE = Sgd(1.0, 0.0)
FACTORS = [PAIR, FRAME, TRIPLE]


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def frame(*shape):
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def begun(form, d_out=11, d_in=8, r=3, batch=()):
    """theta_0 of a factor pair."""
    left = torch.randn(*batch, d_out, r, dtype=torch.float64)
    if form == TRIPLE:
        return frame(*batch, d_out, r), frame(*batch, d_in, r), torch.linspace(2, 1, r).double().expand(*batch, r)
    return left, frame(*batch, d_in, r) if form == FRAME else torch.randn(*batch, d_in, r, dtype=torch.float64)


def ended(form, start, replicas, size=0.1):
    """What replicas made of it; frames are frames again."""
    moved = [[x + size * torch.randn_like(x) for x in start] for _ in range(replicas)]
    for ends in moved:
        for i in {TRIPLE: (0, 1), FRAME: (1,)}.get(form, ()):
            Q, R = torch.linalg.qr(ends[i])
            ends[i] = Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return [tuple(ends) for ends in moved]


def dense(form, weights):
    left, right, *s = (x.double() for x in weights)
    return (left * s[0][..., None, :] if s else left) @ right.mT


def still(start):
    return tuple(torch.zeros_like(x) for x in start)


def mean_of(ends):
    return tuple(torch.stack(xs).mean(0) for xs in zip(*ends, strict=True))


@pytest.mark.parametrize("form", FACTORS)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_product_is_that_of_the_averaged_factors(form, batch):
    start = begun(form, batch=batch)
    ends = ended(form, start, 4)
    found = agree(form, start, ends, still(start), AVERAGE)
    assert_close(dense(form, found.weights), dense(form, mean_of(ends)), rtol=0, atol=1e-12)
    for X in {TRIPLE: found.weights[:2], FRAME: found.weights[1:]}.get(form, ()):
        assert_close(X.mT @ X, torch.eye(3).double().expand(*batch, 3, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FACTORS)
@pytest.mark.parametrize("replicas", [2, 4])
def test_gap_and_change_are_what_dense_matrices_say(form, replicas):
    start = begun(form)
    ends = ended(form, start, replicas)
    found = agree(form, start, ends, tuple(0.01 * torch.randn_like(x) for x in start), Sgd(0.7, 0.9))
    gap = torch.stack([dense(form, end) for end in ends]).mean(0) - dense(form, mean_of(ends))
    assert_close(found.gap, torch.linalg.matrix_norm(gap, 2))
    change = dense(form, found.weights) - dense(form, start)
    assert_close(found.change, torch.linalg.matrix_norm(change, 2))
    assert found.gap > 1e-4 and found.kept == 1


@pytest.mark.parametrize("nesterov", [True, False])
def test_plain_tensors_move_as_under_sgd(nesterov):
    x = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    reference = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=nesterov)
    start, velocity = (x.detach().clone(),), (torch.zeros(5, dtype=torch.float64),)
    for _ in range(3):
        ends = ended(PLAIN, start, 3)
        x.grad = start[0] - mean_of(ends)[0]
        reference.step()
        found = agree(PLAIN, start, ends, velocity, Sgd(0.7, 0.9, nesterov))
        start, velocity = found.weights, found.velocity
        assert_close(start[0], x.detach())


@pytest.mark.parametrize("form", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [1e-1, 1e-2, 0.0])
def test_the_cap_holds_for_the_factors_as_they_are_stored(form, dtype, limit):
    exact = begun(form, batch=(2,))
    start, *ends = [tuple(x.to(dtype) for x in xs) for xs in (exact, *ended(form, exact, 3, size=1.0))]
    found = agree(form, start, ends, still(start), Sgd(0.7, 0.9, True, limit))
    change = torch.linalg.matrix_norm(dense(form, found.weights) - dense(form, start), 2)
    assert (change <= limit * (1 + 1e-6)).all() and (found.kept < 1).all()
    assert all(x.dtype == dtype for x in found.weights)
    if dtype == torch.float32 and limit:
        assert (change > 0.5 * limit).all()  # no shorter than it has to be
    if limit == 0:
        assert all(torch.equal(x, y) for x, y in zip(found.weights, start, strict=True))


@pytest.mark.parametrize("form", FACTORS)
def test_a_replica_that_is_not_finite_moves_nothing_under_a_cap(form):
    start = begun(form)
    ends = ended(form, start, 2)
    ends[1][0][0, 0] = torch.nan
    found = agree(form, start, ends, still(start), Sgd(0.7, 0.9, True, 1.0))
    assert all(torch.equal(x, y) for x, y in zip(found.weights, start, strict=True))
    assert agree(form, start, ends, still(start), Sgd(0.7, 0.9)).weights[0].isnan().any()


@pytest.mark.parametrize("form", [FRAME, TRIPLE])
def test_gradients_and_displacements_go_along_with_the_basis(form):
    start = begun(form)
    ends = ended(form, start, 2, size=0.3)
    found = agree(form, start, ends, still(start), AVERAGE)
    mean = mean_of(ends)
    for X, new, T in zip(mean, found.weights, found.bases, strict=False):
        assert_close(new @ T.mT, X)  # X = U' T^T, so that G_U' = G_X T
    v = tuple(x - y for x, y in zip(start, mean, strict=True))  # what lr 1, momentum 0 make of the velocity
    moved = found.velocity
    for i in (0, 1):  # of one factor alone, to first order in W
        old, new = list(mean), list(found.weights)
        old[i], new[i] = v[i], moved[i]
        assert_close(dense(form, new), dense(form, old))


def test_a_displacement_of_the_spectrum_keeps_its_diagonal():
    start = begun(TRIPLE)
    ends = ended(TRIPLE, start, 2, size=0.3)
    found, mean = agree(TRIPLE, start, ends, still(start), AVERAGE), mean_of(ends)
    moved = mean[0] * (start[2] - mean[2]) @ mean[1].mT
    U, V, _ = found.weights
    assert_close(found.velocity[2], (U.mT @ moved @ V).diagonal())


def test_columns_keep_their_places_and_signs():
    start = begun(TRIPLE)
    start = (*start[:2], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    found = agree(TRIPLE, start, ended(TRIPLE, start, 3, size=0.01), still(start), AVERAGE)
    assert_close(found.weights[2], start[2], rtol=0, atol=0.1)
    assert (found.weights[0] * start[0]).sum(0).min() > 0.99
