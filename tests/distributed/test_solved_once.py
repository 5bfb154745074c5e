"""The contest of bench distributed: every way gives this process's rows of the same result."""

import torch
from torch.testing import assert_close

from nativerank.bench import once
from nativerank.bench.distributed import task_rows
from nativerank.distributed.grid import make_grid
from nativerank.linalg.orthogonalize import orthogonalize, orthogonalizing_factor
from nativerank.linalg.retract import retract
from nativerank.optim.ask import symmetric

X = torch.randn(7, 32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # 7: 2 owners differ
TASKS = [(orthogonalize, lambda G: symmetric(orthogonalizing_factor(G))), (retract, once.inverse_root)]


def results(rank):
    """Of both tasks every way's rows."""
    x = once.Spread(X, make_grid(1, 2, "cpu"))
    found = [{way: call() for way, call in once.ways(x, *task).items()} for task in TASKS]
    found[1]["wide"] = once.by_gram(x, once.inverse_root, wide=True)
    return found


def test_every_way_finds_the_same(forked):
    found = forked(results, 2)
    for task, (whole, _) in enumerate(TASKS):
        expected = whole(X)
        for way in found[0][task]:
            Q = torch.cat([rank[task][way] for rank in found], 1)
            assert_close(Q, retract(X, "qr") if way == "gather-qr" else expected, msg=lambda m, way=way: f"{way}: {m}")


def small_contest(rank):
    once.COUNT, once.D, once.R = 3, 16, 4
    return once.measure_once(make_grid(1, 2, "cpu"), repeats=2)


def test_the_contest_is_recorded(forked):
    tasks, _ = forked(small_contest, 2)
    assert [row["task"] for row in tasks] == ["orthogonalize", "retract"]
    assert set(tasks[1]["seconds"]) == {"gram", "gram-float32", "owner", "gather", "gather-qr"}
    for row in task_rows({"once": tasks}):
        (raw,) = (one for one in tasks if one["task"] == row["task"])
        assert all(len(times) == 2 and min(times) > 0 for times in raw["seconds"].values())
        for way, seconds in row["seconds"].items():
            assert min(raw["seconds"][way]) <= seconds <= max(raw["seconds"][way])
            each = [one / other for one, other in zip(raw["seconds"]["gather-qr"], raw["seconds"][way], strict=True)]
            assert min(each) <= row["speedup"][way] <= max(each), "of rounds, by turns"
        assert row["speedup"]["gather-qr"] == 1
    assert max(tasks[1]["off_orthonormal"].values()) < 1e-5
