"""The outer step of DiLoCo over forked processes, against what it says of itself, computed densely in float64."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nativerank.distributed.grid import SINGLE, make_grid
from nativerank.distributed.pieces import full
from nativerank.layers.lowrank import LowRankLinear
from nativerank.layers.spectral import SpectralLinear
from nativerank.methods import build_optimizer
from nativerank.optim.outer import Outer

METHODS = {  # id -> what its optimizer is asked for
    "spectron": {"method": "spectron", "certified": True},
    "lowrank-adamw": {"method": "lowrank-adamw"},
    "sct": {"method": "sct"},
    "tsvd": {"method": "tsvd"},
    "stiefel-spectron": {"method": "stiefel-spectron"},
    "one frame": {"method": "stiefel-spectron", "frames": "one"},
}
SPECTRAL = ("sct", "tsvd", "stiefel-spectron")
AVERAGE = {"every": 3, "lr": 1.0, "momentum": 0.0}
LR = 0.02


def make_model(case):
    torch.manual_seed(0)
    layer = SpectralLinear if case in SPECTRAL else LowRankLinear
    return nn.Sequential(nn.Linear(9, 12), layer(12, 10, 4), nn.Tanh(), layer(10, 14, 3, bias=True))


def make(case, grid=SINGLE, **outer):
    """Model, inner optimizer, outer optimizer."""
    model = make_model(case)
    optimizer = build_optimizer(model, lr=LR, aux_lr=0.01, **METHODS[case])
    return model, optimizer, Outer(model, optimizer, grid, **AVERAGE | outer)


def inner_steps(model, optimizer, outer, seeds):
    for seed in seeds:
        x = torch.randn(16, 9, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        (model(x) - x.sum(-1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()
        outer.budget += LR


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def products(model):
    return {str(i): model[i].to_dense().double() for i in (1, 3)}


def norm(X):
    return torch.linalg.matrix_norm(X, 2).item()


def one_round(rank, replicas, case, options):
    """Weights at the start, before and after the outer step, and what it reported."""
    model, optimizer, outer = make(case, make_grid(replicas, 1, "cpu"), **options)
    start = weights(model)
    inner_steps(model, optimizer, outer, range(10 * rank, 10 * rank + 3))
    inner, W = weights(model), products(model)
    report = outer.step()
    return {"start": start, "inner": inner, "W": W, "end": weights(model), "report": report, "new W": products(model)}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_agree_on_the_average(forked, case, replicas):
    found = forked(one_round, replicas, replicas, case, {})
    for other in found[1:]:
        assert all(torch.equal(x, found[0]["end"][name]) for name, x in other["end"].items())
    mean = {name: sum(f["inner"][name].double() for f in found) / replicas for name in found[0]["inner"]}
    factors = ("up.weight", "down.weight", ".s")
    for name, x in found[0]["end"].items():
        if case in ("spectron", "lowrank-adamw") or not name.endswith(factors):
            assert torch.equal(x, mean[name].float()), name
    for i in ("1", "3"):
        up, down, s = mean[f"{i}.up.weight"], mean[f"{i}.down.weight"], mean.get(f"{i}.s", torch.ones(1))
        assert_close(found[0]["new W"][i], (up * s) @ down, rtol=0, atol=3e-6)  # as stored in float32
        gap, change, kept = found[0]["report"].pairs[i]
        assert gap == pytest.approx(norm(sum(f["W"][i] for f in found) / replicas - (up * s) @ down), abs=1e-6)
        old_up, old_down, old_s = (
            found[0]["start"].get(f"{i}.{n}", torch.ones(1)).double() for n in ("up.weight", "down.weight", "s")
        )
        assert change == pytest.approx(norm(found[0]["new W"][i] - (old_up * old_s) @ old_down), abs=1e-6)
        assert gap > 1e-5 and kept == 1
        for X in {"one frame": [found[0]["end"][f"{i}.down.weight"].mT]}.get(case, []) + (
            [found[0]["end"][f"{i}.up.weight"], found[0]["end"][f"{i}.down.weight"].mT] if case in SPECTRAL else []
        ):
            assert_close(X.mT @ X, torch.eye(X.shape[1]), rtol=0, atol=1e-5)
    assert {f["report"].row()["budget"] for f in found} == {3 * LR}


@pytest.mark.parametrize("case", ["spectron", "stiefel-spectron", "one frame"])
def test_the_cap_is_a_multiple_of_the_inner_rates(forked, case):
    free, capped = (forked(one_round, 2, 2, case, {"lr": 3.0, "momentum": 0.9, "cap": cap})[0] for cap in (None, 0.5))
    assert free["report"].row()["update_norm"] > 0.5 * 3 * LR
    report = capped["report"].row(["1"])
    assert report["update_norm"] <= 0.5 * 3 * LR and report["shortened"] > 0
    assert report["pairs"]["1"]["update_norm"] == capped["report"].pairs["1"][1]


@pytest.mark.parametrize("case", METHODS)
def test_one_replica_that_averages_trains_as_if_alone(case):
    model, optimizer, outer = make(case)
    alone, its_own, _ = make(case)
    for seed in range(6):
        inner_steps(model, optimizer, outer, [seed])
        inner_steps(alone, its_own, outer, [seed])
        report = outer.step()
        assert report.row()["factor_gap"] == 0
    exact = case in ("spectron", "lowrank-adamw")
    for name, x in weights(alone).items():
        assert_close(weights(model)[name], x, rtol=0, atol=0 if exact else 1e-4)  # frames are made frames again


def turned_moments(rank):
    """Moments of the first layer's factors and R before and after, with the frames."""
    model, optimizer, outer = make("tsvd", make_grid(2, 1, "cpu"))
    inner_steps(model, optimizer, outer, range(10 * rank, 10 * rank + 3))
    layer = model[1]
    sides = {"U": (layer.up.weight, False), "V": (layer.down.weight, True)}

    def state():
        found = {}
        for side, (p, down) in sides.items():
            tall = {"X": p.detach(), **{k: optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}}
            found[side] = {k: (v.mT if down else v).clone() for k, v in tall.items()} | {
                "R": optimizer.state[p]["R"].clone()
            }
        return found

    before = state()
    outer.step()
    return before, state()


def test_tsvd_averages_its_triangles_and_its_moments_follow_the_frames(forked):
    found = forked(turned_moments, 2)
    for side in ("U", "V"):
        R = [before[side]["R"] for before, _ in found]
        X = sum(before[side]["X"] for before, _ in found) / 2
        for i, (before, after) in enumerate(found):
            assert_close(after[side]["R"], (R[0] + R[1]) / 2)
            assert after[side]["R"].diagonal().min() > 0 and torch.equal(after[side]["R"], after[side]["R"].triu())
            T = (after[side]["X"].mT @ X).mT  # X = U' T^T
            K = R[i].mT @ T @ torch.linalg.inv(after[side]["R"]).mT
            assert_close(after[side]["exp_avg"], before[side]["exp_avg"] @ K, rtol=1e-4, atol=1e-7)
            assert_close(after[side]["exp_avg_sq"], before[side]["exp_avg_sq"] @ K.square(), rtol=1e-4, atol=1e-7)


class Traffic(TorchDispatchMode):
    """Counts collectives and the bytes that this process gives to them."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls.append(func.name())
            self.bytes += args[1].nbytes if "alltoall_base" in func.name() else args[0][0].nbytes
        return func(*args, **kwargs or {})


def traffic(rank, case):
    model, optimizer, outer = make(case, make_grid(2, 1, "cpu"))
    inner_steps(model, optimizer, outer, range(3))
    with Traffic() as seen:
        outer.step()
    return len(seen.calls), seen.bytes, sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("case", METHODS)
def test_an_outer_step_is_two_exchanges_of_the_weights(forked, case):
    found = forked(traffic, 2, case)
    assert {calls for calls, _, _ in found} == {3 if case == "tsvd" else 2}
    small = 4096  # bases, norms, triangles and padding of this tiny model
    assert sum(sent for _, sent, _ in found) <= 2 * 2 * found[0][2] + small  # two processes, two copies each


def momenta(outer):
    names = {id(p): name for name, p in outer.model.named_parameters()}
    return [piece for piece in outer.pieces(names) if piece.name.endswith("/outer_momentum")]


class FakeOptimizer:
    """An inner optimizer whose state is elsewhere."""

    def __init__(self, rules, params):
        self.param_groups, self.state = [{"rule": rule, "params": [params[name]]} for name, rule in rules.items()], {}

    def loaded(self):
        pass

    def pieces(self, names):
        return []


def placement(p):
    return Shard(1) if p.dim() == 2 and p.shape[1] % 2 == 0 and p.shape[1] > p.shape[0] else Shard(0)


def noise(name, p, seed):
    generator = torch.Generator().manual_seed(seed * 1000 + len(name) + p.numel())
    return 0.1 * torch.randn(p.shape, generator=generator)


def sharded_rounds(rank, shards, case):
    """Whole weights and pieces after two outer steps on two replicas whose inner steps are noise."""
    grid = make_grid(2, shards, "cpu")
    model = make_model(case)
    model[0] = nn.Linear(9, 7001)  # large enough to be dealt out, in uneven rows
    groups = build_optimizer(model, **METHODS[case]).param_groups
    rules = {name: g["rule"] for g in groups for name in g["param_names"]}
    if shards > 1:
        fully_shard(model, mesh=grid.mesh["shard"], shard_placement_fn=placement)
    params = dict(model.named_parameters())
    outer = Outer(model, FakeOptimizer(rules, params), grid, every=1)
    reports = []
    for step in range(2):
        with torch.no_grad():
            for name, p in params.items():
                change = noise(name, p, 10 * step + grid.replica)
                p.add_(distribute_tensor(change, p.device_mesh, p.placements) if shards > 1 else change)
        reports.append(outer.step().pairs)
    pieces = [(p.name, p.tensor, p.shape, p.along, p.start) for p in momenta(outer)]
    return {name: full(p.detach()).clone() for name, p in params.items()}, reports, pieces


@pytest.mark.parametrize("case", ["spectron", "stiefel-spectron", "one frame"])
def test_replicas_of_shards_do_what_whole_replicas_do(forked, case):
    plain, sharded = forked(sharded_rounds, 2, 1, case), forked(sharded_rounds, 4, 2, case)
    for weights, reports, _ in [*plain, *sharded]:
        assert_close(weights, plain[0][0])
        assert_close(reports, plain[0][1])
    for found in (plain, sharded):  # every momentum is there, once
        whole = {}
        for name, tensor, shape, along, start in (piece for _, _, pieces in found for piece in pieces):
            target = whole.setdefault(name, torch.full(shape, torch.nan))
            part = target if along is None else target.narrow(along, start, tensor.shape[along])
            assert part.isnan().all()
            part.copy_(tensor)
        assert sorted(whole) == sorted(f"{name}/outer_momentum" for name in plain[0][0])
        assert not any(x.isnan().any() for x in whole.values())


def sharded_training(rank, shards, case, algebra):
    """Whole weights and reports after two rounds of two replicas that read data of their own."""
    grid = make_grid(2, shards, "cpu")
    model = make_model(case)
    if shards > 1:
        fully_shard(model, mesh=grid.mesh["shard"], shard_placement_fn=placement)
    asked = METHODS[case]
    optimizer = build_optimizer(model, lr=LR, aux_lr=0.01, grid=grid.within_replica(), algebra=algebra, **asked)
    outer, reports = Outer(model, optimizer, grid, every=2), []
    for turn in range(2):  # shards of a replica read the same here, so that their mean is that of one process
        inner_steps(model, optimizer, outer, [100 * grid.replica + 2 * turn, 100 * grid.replica + 2 * turn + 1])
        reports.append(outer.step().pairs)
    return {name: full(p.detach()).clone() for name, p in model.named_parameters()}, reports


@pytest.mark.parametrize("algebra", ["owner", "gram"])
@pytest.mark.parametrize("case", METHODS)
def test_replicas_of_shards_train_as_whole_replicas_do(forked, case, algebra):
    whole, shards = forked(sharded_training, 2, 1, case, "auto"), forked(sharded_training, 4, 2, case, algebra)
    for weights, reports in shards:
        assert_close(weights, whole[0][0], rtol=0, atol=2e-4)
        assert_close(reports, whole[0][1], rtol=1e-3, atol=1e-4)


def everything(outer):
    names = {id(p): name for name, p in outer.model.named_parameters()}
    return {piece.name: piece.tensor for piece in outer.pieces(names)}


def interrupted(rank, case, stop):
    """Weights after four rounds; after `stop` of them all is made anew, and filled from weights and pieces."""
    grid = make_grid(2, 1, "cpu")
    options = {"every": 2, "lr": 0.7, "momentum": 0.9}
    model, optimizer, outer = make(case, grid, **options)
    for turn in range(4):
        if turn == stop:
            kept, pieces = weights(model), everything(outer)
            model, optimizer, outer = make(case, grid, **options)
            model.load_state_dict(kept)
            for name, tensor in everything(outer).items():
                tensor.copy_(pieces[name])
            outer.begin()
        inner_steps(model, optimizer, outer, [100 * rank + 2 * turn, 100 * rank + 2 * turn + 1])
        outer.step()
    return weights(model), sorted(everything(outer))


@pytest.mark.parametrize("case", METHODS)
def test_a_resumed_run_has_the_same_bits(forked, case):
    straight, resumed = forked(interrupted, 2, case, -1), forked(interrupted, 2, case, 2)
    for (one, _), (other, _) in zip(straight, resumed, strict=True):
        assert all(torch.equal(x, other[name]) for name, x in one.items())
    names = [name for _, own in straight for name in own]
    assert len(names) == len(set(names))  # a checkpoint holds everything, once
    assert sum(name.endswith("@0") for name in names) == sum(name.endswith("@1") for name in names) > 0


def resized_rounds(rank, case):
    """The momentum as displacements of W, before and after a change of rank, and weights one round later."""
    model, optimizer, outer = make(case, make_grid(2, 1, "cpu"), momentum=0.9)
    for turn in range(2):
        inner_steps(model, optimizer, outer, range(10 * rank + 3 * turn, 10 * rank + 3 * turn + 3))
        outer.step()

    def displacement():
        """v_A B^T or v_U diag(s) V^T, of the unit's owner."""
        _, *s, V = (x.detach() for x in model[1].factors())
        right = V * s[0] if s else V
        return [p.tensor @ right.mT for p in momenta(outer) if p.name == "1.up.weight/outer_momentum"]

    before = displacement()
    optimizer.resize(model[1].resize(6))  # grown columns of A are zero, so that no product changes
    outer.begin()
    grown = displacement()
    optimizer.resize(model[1].resize(4))
    outer.begin()
    back = displacement()
    inner_steps(model, optimizer, outer, [7])
    outer.step()
    return before, grown, back, weights(model)


@pytest.mark.parametrize("case", ["spectron", "stiefel-spectron"])
def test_the_momentum_follows_other_ranks(forked, case):
    found = forked(resized_rounds, 2, case)
    assert sum(len(before) for before, *_ in found) == 1
    for before, grown, back, _ in found:
        for one, other, last in zip(before, grown, back, strict=True):
            assert_close(other, one)
            assert_close(last, one, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(x, found[1][3][name]) for name, x in found[0][3].items())


@pytest.mark.parametrize("wrong", [{"every": 0}, {"lr": 0.0}, {"momentum": 1.0}, {"cap": 0.0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make("spectron", **wrong)
