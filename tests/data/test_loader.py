"""The order: a permutation in every epoch, the same for every world size, resumable anywhere at no cost."""

import numpy as np
import pytest

from nativerank.data.loader import Loader, document_positions, permute, sequential_batches


class ArraySplit:
    """A split of the tokens 0, 1, 2, ... in memory."""

    def __init__(self, tokens):
        self.tokens = tokens

    def read(self, start, count):
        assert 0 <= start <= start + count <= self.tokens
        return np.arange(start, start + count, dtype=np.int64)


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4097, 100_003])
def test_every_epoch_is_a_bijection(n):
    orders = [permute(np.arange(n), n, seed=3, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(n))
    if n > 20:
        assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])


def test_the_order_is_evenly_spread():
    """Each of 10 windows comes first in a tenth of the epochs, and neighbours do not stay neighbours."""
    first = np.bincount([permute(np.array([0]), 10, 0, epoch)[0] for epoch in range(5000)], minlength=10)
    assert ((first - 500) ** 2 / 500).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001
    order = permute(np.arange(100_000), 100_000, 1, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.01


def test_seeds_differ_and_the_order_never_changes_between_releases():
    assert permute(np.arange(12), 12, 0, 0).tolist() == [9, 10, 11, 7, 6, 4, 0, 2, 3, 1, 5, 8]
    assert not np.array_equal(permute(np.arange(50), 50, 0, 0), permute(np.arange(50), 50, 1, 0))
    far = permute(np.array([0, 1, 2**40 - 1]), 2**40, seed=7, epoch=3)  # needs no memory in n
    assert far.tolist() == [839680359101, 283785663285, 650066373982]


@pytest.mark.parametrize("shuffle", [True, False])
def test_windows_cover_the_stream_once_per_epoch(shuffle):
    loader = Loader(ArraySplit(103), context=5, batch_size=4, seed=1, shuffle=shuffle)  # 20 windows, 5 batches
    for _ in range(3):
        batches = [loader.next() for _ in range(5)]
        inputs = np.concatenate([x for x, _ in batches])
        assert np.array_equal(np.sort(inputs, axis=None), np.arange(100))
        assert all(np.array_equal(y, x + 1) and x.dtype == y.dtype == np.int64 for x, y in batches)
    assert loader.epoch == 3.0


def test_epochs_run_into_each_other_without_gap_or_repeat():
    loader = Loader(ArraySplit(36), context=5, batch_size=3, seed=1)  # 7 windows
    starts = np.concatenate([loader.next()[0][:, 0] for _ in range(14)])
    for epoch in range(6):
        assert sorted(starts[7 * epoch : 7 * epoch + 7] // 5) == list(range(7))


@pytest.mark.parametrize("steps", [0, 1, 6, 1000])
def test_resume_continues_exactly(steps):
    def make():
        return Loader(ArraySplit(200), context=6, batch_size=5, seed=4)

    straight, resumed = make(), make()
    for _ in range(steps):
        straight.next()
    state = straight.state()
    assert all(type(value) is int for value in state.values()) and set(state) == {"samples", "seed", "context"}
    resumed.load_state(state)
    for _ in range(20):
        for a, b in zip(straight.next(), resumed.next(), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_world_size(world_size):
    whole = Loader(ArraySplit(200), context=6, batch_size=8, seed=4)
    ranks = [Loader(ArraySplit(200), 6, 8 // world_size, 4, rank, world_size) for rank in range(world_size)]
    for _ in range(12):
        parts = [rank.next() for rank in ranks]
        for i, expected in enumerate(whole.next()):
            assert np.array_equal(np.concatenate([part[i] for part in parts]), expected)
    assert all(rank.state() == whole.state() for rank in ranks)


def test_a_batch_larger_than_the_split_wraps_around():
    inputs, _ = Loader(ArraySplit(11), context=5, batch_size=4, seed=0).next()  # 2 windows
    assert sorted(inputs[:2, 0]) == sorted(inputs[2:, 0]) == [0, 5]


def test_bad_states_and_sizes_are_refused():
    loader = Loader(ArraySplit(100), context=6, batch_size=2, seed=4)
    for state, message in [
        ({"samples": 3, "seed": 4}, "no 'context'"),
        ({"samples": 3, "seed": 5, "context": 6}, "seed 5, this run has 4"),
        ({"samples": 3, "seed": 4, "context": 8}, "context 8, this run has 6"),
        ({"samples": -3, "seed": 4, "context": 6}, "samples -3"),
    ]:
        with pytest.raises(ValueError, match=message):
            loader.load_state(state)
    for tokens in (0, 1, 6):
        with pytest.raises(ValueError, match=f"the split has {tokens} tokens, too few for one window of 6"):
            Loader(ArraySplit(tokens), context=6, batch_size=2, seed=4)
    assert Loader(ArraySplit(7), context=6, batch_size=2, seed=4).num_windows == 1


@pytest.mark.parametrize("tokens", [2, 3, 12, 13, 14, 61, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_validation_predicts_every_token_after_the_first_once(tokens, batch_size):
    targets = []
    for x, y, valid in sequential_batches(ArraySplit(tokens), 6, batch_size):
        assert x.shape == y.shape == valid.shape and x.shape[1] == 6 and 1 <= len(x) <= batch_size
        assert np.array_equal(x[valid] + 1, y[valid])
        targets += y[valid].tolist()
    assert targets == list(range(1, tokens))


def test_a_bounded_validation_is_fixed_and_evenly_spread():
    split = ArraySplit(6 * 100 + 1)
    starts = [x[:, 0] // 6 for x, _, _ in sequential_batches(split, 6, 4, max_tokens=60)]
    assert np.concatenate(starts).tolist() == list(range(0, 100, 10))
    assert len(list(sequential_batches(split, 6, 4, max_tokens=1))) == 1
    assert sum(len(x) for x, _, _ in sequential_batches(split, 6, 4, max_tokens=10**9)) == 100
    with pytest.raises(ValueError, match="the split has 1 tokens"):
        sequential_batches(ArraySplit(1), 6, 4)


def test_positions_restart_at_every_end_of_text():
    inputs = np.array([[5, 5, 0, 5, 5, 0, 0, 5], [0, 5, 5, 5, 5, 5, 5, 0]])
    expected = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]
    assert document_positions(inputs, eot_id=0).tolist() == expected
    assert document_positions(inputs, eot_id=9).tolist() == [list(range(8))] * 2
