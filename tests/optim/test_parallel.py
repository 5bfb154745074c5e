"""Pieces of work on several cores: the same bits, errors that arrive, and no trace in PyTorch's settings."""

import threading
import time

import pytest
import torch
from torch.testing import assert_close

from nativerank.linalg.orthogonalize import EIGEN_RANK
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.parallel import at_once, run_all


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_every_piece_runs_in_a_thread_of_its_own_with_one_thread_inside(threads):
    threads(2)
    seen, both = {}, threading.Barrier(2, timeout=30)

    def piece():
        both.wait()  # passes only if two pieces run at once
        torch.ones(10).sum()
        seen[threading.get_ident()] = torch.get_num_threads()

    run_all([piece] * 8, 2)
    assert len(seen) == 2 and set(seen.values()) == {1} and threading.get_ident() not in seen
    assert torch.get_num_threads() == 2
    inherited = []
    later = threading.Thread(target=lambda: inherited.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert inherited == [2]


@pytest.mark.parametrize("count", [1, 2])
def test_errors_arrive(count):
    def fail():
        raise RuntimeError("the second piece")

    with pytest.raises(RuntimeError, match="the second piece"):
        run_all([int, fail, int], count)


def test_nothing_goes_on_after_an_error_has_arrived():
    ended = []

    def slow():
        time.sleep(0.2)
        ended.append(True)

    with pytest.raises(ZeroDivisionError):
        run_all([lambda: 1 / 0, slow], 2)
    assert ended == [True]


def test_only_large_matrices_on_a_cpu_are_worked_on_together(threads):
    threads(2)
    small, large = torch.empty(300, EIGEN_RANK - 1), torch.empty(EIGEN_RANK, 300)
    assert (at_once([small]), at_once([small, large])) == (1, 2)
    assert at_once([large, large.to("meta")]) == 1


@pytest.mark.parametrize("rule", ["spectron", "muon"])
def test_the_number_of_threads_does_not_change_a_bit(rule, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        g = torch.Generator().manual_seed(0)
        shapes = [s for r in (8, 170) for _ in range(3) for s in ((200, r), (r, 180))]  # below and above EIGEN_RANK
        params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
        optimizer = LowRankOptimizer([{"params": params, "rule": rule, "lr": 0.1}])
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g)
            optimizer.step()
        results.append([p.detach() for p in params])
    for other in results[1:]:
        assert_close(results[0], other, rtol=0, atol=0)
