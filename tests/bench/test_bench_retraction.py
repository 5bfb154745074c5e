"""The retraction benchmark on tiny shapes: every way is timed and checked, and the loop is the published form."""

import json

import pytest
import torch
from torch.testing import assert_close

from nativerank.bench import retraction
from nativerank.linalg import retract
from nativerank.optim.stacks import members_per_stack


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(retraction, "LAYER_70B", ((2, 40, 4), (1, 60, 4)))
    monkeypatch.setattr(retraction, "WIDE", ((2, 30, 8),))


def test_every_way_is_measured_on_both_cases(tiny, cli):
    result = cli("bench", "retraction", "--layers", "3", "--repeats", "2", "--threads", "1", "--json")
    assert result.code == 0, result.err
    first, second = json.loads(result.out)["cases"]
    assert first["case"] == {"stacks": "70b", "threads": 1, "shapes": [[6, 40, 4], [3, 60, 4]]}
    assert (second["case"]["stacks"], second["case"]["shapes"]) == ("wide", [[2, 30, 8]])
    for part in (first, second):
        assert set(part["seconds"]) == {"loop", "qr", "cholesky", "polar", "cayley"} == set(part["ratio"])
        assert min(part["seconds"].values()) > 0 and part["reference"] == "loop"
        assert 0 < max(part["off_orthonormal"].values()) <= 5e-6


def test_the_table_names_what_was_measured(tiny, cli):
    out = cli("bench", "retraction", "--repeats", "1", "--threads", "1").out
    assert all(word in out for word in ("4 of (40, 4)", "2 of (30, 8)", "loop", "cayley", "x"))


def test_contestants_find_the_same_frames():
    U, X = retraction.step_of_frames((3, 50, 5), torch.device("cpu"))
    assert retraction.off_orthonormal(U) <= 5e-6 < 1e-2 < retraction.off_orthonormal(X)
    assert torch.linalg.matrix_norm(X - U, 2).max() < 2 * retraction.STEP
    assert_close(torch.stack([retraction.looped(x) for x in X]), retract(X), atol=2e-6, rtol=0)  # float32


@pytest.mark.parametrize("name", ["layers", "repeats", "threads"])
def test_sizes_below_one_are_one_line(name, cli):
    result = cli("bench", "retraction", f"--{name}", "0")
    assert (result.code, result.err) == (2, f"nativerank: error: --{name} must be at least 1, got 0\n")


def test_processor_time_is_of_one_thread(tiny, cli):
    sizes = ("bench", "retraction", "--repeats", "1", "--clock", "cpu")
    result = cli(*sizes, "--threads", "1", "--json")
    assert result.code == 0 and json.loads(result.out)["settings"]["clock"] == "cpu"
    refused = cli(*sizes, "--threads", "2")
    assert refused.code == 2 and "--clock cpu adds up the time of all threads" in refused.err


def test_stacks_are_those_of_the_optimizer():
    """As many matrices as its limit takes, and the rest."""
    whole = [(880, 8192, 32), (240, 28672, 32), (1, 1 << 20, 32)]
    found = retraction.as_the_optimizer_does(whole, torch.device("cuda"))
    assert found[:28] == [(32, 8192, 32)] * 27 + [(16, 8192, 32)]
    assert found[28:55] == [(9, 28672, 32)] * 26 + [(6, 28672, 32)] and found[55:] == [(1, 1 << 20, 32)]
    for n, d, r in found:
        unit = [torch.empty(d, r, device="meta")]
        assert n <= members_per_stack(unit)
    assert {n for n, d, _ in found if d == 8192} == {members_per_stack([torch.empty(8192, 32, device="meta")]), 16}
