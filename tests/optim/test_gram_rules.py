"""Update rules on row shards against the ordinary ones: bits of arithmetic aside, the same steps.

The processes are pretended (`row_shards`), so everything but the exchange itself runs as on real ones.
"""

import itertools

import pytest
import torch
from row_shards import GRIDS, MANY, UNEVEN, Cluster, compare, gradients, ordinary, run_both, settings, started, unit
from torch.testing import assert_close

from nativerank.bench.bound import ETA, adversarial_cases
from nativerank.linalg.change import update_norm
from nativerank.optim.gram_products import proven_norm
from nativerank.optim.gram_rules import GRAM_RULES, refusal
from nativerank.optim.rules import RULES
from nativerank.optim.traffic import per_unit

ORTH = [{}, {"orthogonalizer": "polar-express", "orthogonalizer_steps": 7}, {"orthogonalizer": "none"}]
MU = [{"nesterov": True, "shape_scale": "original"}, {"nesterov": False, "momentum": 0.0}]
BOUND = [{}, {"norm": "exact"}, {"certified": True}, {"step": "root", "power_iterations": 3}]
BOUND.append({"renormalize": False, "lr": 0.002})
CAP = [{"update_cap": 0.02}, {"update_cap": 50.0}]
DECAY = [{"weight_decay": 0.1}, {}]
MOVED = [{}, {"preserve": True}, {"riemannian": True}, {"preserve": True, "riemannian": True}]
WAYS = [{"retraction": way} for way in ("cholesky", "polar", "qr")]
STEPS = [{}, {"step": "root"}, {"renormalize": False}, {"s_lr": 0.01, "weight_decay": 0.1}]
AXES = {
    "muon": [ORTH, [*MU, {"shape_scale": "match_rms_adamw"}], DECAY],
    "spectron": [ORTH, MU, BOUND, DECAY],
    "adamw-capped": [CAP, DECAY],
    "adam-muon": [ORTH, [*CAP, {"update_cap": None}], [{"nesterov": True}, {"shape_scale": "original"}], DECAY],
    "sct": [WAYS, MOVED, [{"lr": 0.02}, {"lr": 0.05, "weight_decay": 0.1, "s_lr": 0.01}]],
    "tsvd": [WAYS[::2], [{}, {"weight_decay": 0.1, "s_lr": 0.01}]],
    "stiefel-spectron": [WAYS, MOVED, ORTH, MU, STEPS],
    "frame-spectron": [WAYS, ORTH, MU, BOUND, DECAY],
}
MORE = [("sct", {"retract_every": 3, **way, **moved}) for way in WAYS for moved in MOVED[:2]]


def merged(picked):
    return {k: v for d in picked for k, v in d.items()}


def singly(axes):
    """Every choice of every axis, beside the first of the others."""
    seen = [[axis[0] for axis in axes]]
    for i, axis in enumerate(axes):
        seen += [[*seen[0][:i], choice, *seen[0][i + 1 :]] for choice in axis[1:]]
    return map(merged, seen)


ONES = [(rule, options) for rule, axes in AXES.items() for options in singly(axes)] + MORE[:2]
ALL = [(rule, options) for rule, axes in AXES.items() for options in map(merged, itertools.product(*axes))] + MORE
PLACED = list(zip(ONES, itertools.cycle(GRIDS), strict=False))


def named(case):
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())]) if isinstance(case, tuple) else case


def test_every_rule_is_there():
    assert set(GRAM_RULES) == set(AXES) == {name for name, rule in RULES.items() if rule.kind != "elementwise"}


@pytest.mark.parametrize("case, grid", PLACED, ids=named)
def test_twenty_steps_on_shards_are_those_of_one_process(case, grid):
    rule, changes = case
    compare(*run_both(rule, settings(rule, **changes), GRIDS[grid], 20))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=named)
def test_so_they_are_with_every_combination_of_options_on_every_grid(case):
    rule, changes = case
    for grid in GRIDS.values():
        compare(*run_both(rule, settings(rule, **changes), grid, 20))


def least(rule, **changes):
    """Settings that the rule accepts."""
    return settings(rule, **merged(axis[0] for axis in AXES[rule]), **changes)


def lost(grads, step):
    """Of three units one never has a gradient, one meets NaN at step 2, and one infinity at step 3."""
    for g in grads:
        g[0] = 0
        g[1].view(-1)[3] = torch.nan if step == 2 else g[1].view(-1)[3]
        g[2].view(-1)[1] = torch.inf if step == 3 else g[2].view(-1)[1]


@pytest.mark.parametrize("rule", AXES)
def test_zero_and_bad_gradients_do_what_they_do_in_one_process(rule):
    for changes in ({}, {"orthogonalizer": "none"} if "orthogonalizer" in RULES[rule].options else {"preserve": False}):
        alone, cluster = run_both(rule, {**least(rule), **changes}, MANY, 5, lost)
        compare(alone, cluster)
        assert alone.weights[0][0].isfinite().all() and not alone.weights[0][1:].isfinite().all()


@pytest.mark.parametrize("rule", AXES)
def test_in_float32_steps_agree_to_its_rounding(rule):
    made = [unit(rule, least(rule), torch.float32, (64, 48, 8)) for _ in range(2)]
    cluster, g = Cluster(made[1], UNEVEN), torch.Generator().manual_seed(0)
    for _ in range(3):
        grads = [torch.randn(w.shape, generator=g) for w in made[0].weights]
        ordinary(made[0], grads)
        cluster.step(grads)
        for i, w in enumerate(made[0].weights):
            assert_close(cluster.weight(i), w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", AXES)
def test_narrow_state_is_kept_narrow_on_shards(rule):
    """Means go to the nearest; squares go up or down by noise that depends on the place among the rows of a shard."""
    made = [unit(rule, {**least(rule), "state_dtype": "bf16", "lr": 0.01}, torch.float32) for _ in range(2)]
    cluster = Cluster(made[1], UNEVEN)
    for step in range(3):
        grads = gradients(made[0], step)
        ordinary(made[0], grads)
        cluster.step(grads)
    for i, w in enumerate(made[0].weights):
        assert_close(cluster.weight(i), w, rtol=0, atol=1e-3)
        for name, x in made[0].states[i].items():
            assert_close(cluster.state(i)[name], x, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("rule", ["spectron", "adamw-capped", "adam-muon", "frame-spectron"])
def test_bounds_hold_on_every_adversarial_step(rule):
    """||dW|| <= eta in float32 from sums that were taken before the step existed."""
    _, A, B, G_A, G_B, u_A, u_B = zip(*list(adversarial_cases())[::2], strict=True)
    dtype = torch.float64 if rule == "frame-spectron" else torch.float32  # what it stores is rounded after the bound
    A, B, G_A, G_B, u_A, u_B = (torch.stack(x).to(dtype) for x in (A, B, G_A, G_B, u_A, u_B))
    bound = {"update_cap": ETA} if "update_cap" in RULES[rule].options else {"certified": True}
    hard = {"orthogonalizer": "polar-express", "orthogonalizer_steps": 9}
    for changes in ({}, hard if rule != "adamw-capped" else {"lr": 30.0}):
        g, shapes = torch.Generator().manual_seed(0), [tuple(A.shape[1:]), tuple(B.mT.shape[1:])]
        made = started(rule, settings(rule, **bound, **{"lr": ETA, **changes}), [A, B], shapes, g)
        for state, u in zip(made.states, (u_A, u_B), strict=True):
            state.update({"power_vector": u} if "power_vector" in state else {})
        cluster = Cluster(made, MANY)
        cluster.step([G_A, G_B])
        new = [cluster.weight(i) for i in (0, 1)]
        if rule != "frame-spectron":
            new = [X.double() - cluster.change(i) for i, X in enumerate((A, B))]
        ratio = update_norm(A, B, *new) / ETA
        good = ratio.isfinite()
        assert good.all() or rule == "frame-spectron", "factors of lost rank make no frames there"
        assert ratio[good].max() <= 1 and ratio[good].max() > 0.9 and good.sum() > 500


def test_the_norm_of_a_product_is_bounded_before_it_is_formed():
    """Also where rounding in the sums is magnified: polynomials on momenta of lost rank, and no momentum at all."""
    g = torch.Generator().manual_seed(0)
    M = torch.randn(40, 300, 24, generator=g, dtype=torch.float64) * torch.logspace(0, -12, 24, dtype=torch.float64)
    M[0], M[1, :, 3:], M[2] = 0, 0, M[2] * 1e-150
    Q = torch.randn(40, 24, 24, generator=g, dtype=torch.float64) * torch.logspace(12, 0, 24, dtype=torch.float64)
    Q[0] *= 1e153
    bound, truth = proven_norm(M.mT @ M, Q, 300), torch.linalg.matrix_norm(M @ Q, 2)
    assert (bound >= truth * (1 - 1e-12)).all() and bound.isfinite().all()
    easy = M[3:, :, :1].contiguous(), torch.eye(1, dtype=torch.float64).expand(37, 1, 1)
    tight = torch.linalg.matrix_norm(easy[0], 2)
    assert_close(proven_norm(easy[0].mT @ easy[0], easy[1], 300), tight, rtol=1e-9, atol=0)


def error(Q):
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().amax((-2, -1))


@pytest.mark.parametrize("rule", ["sct", "tsvd", "stiefel-spectron", "frame-spectron"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 2e-13)])
def test_frames_are_frames_after_one_pass(rule, dtype, limit):
    ways = WAYS[:1] if rule == "tsvd" else WAYS[:2]
    for lr, way in itertools.product((0.01, 0.2, 1.0), ways):
        made = unit(rule, settings(rule, lr=lr, **way), dtype, (96, 64, 16))
        cluster, g = Cluster(made, UNEVEN), torch.Generator().manual_seed(1)
        for _ in range(4):
            cluster.step([torch.randn(w.shape, generator=g, dtype=dtype) for w in made.weights])
            for i in (0, 1) if rule != "frame-spectron" else (1,):
                assert error(cluster.weight(i)).max() <= limit


@pytest.mark.parametrize("way", ["cholesky", "polar"])
def test_a_step_that_undoes_its_frame_leaves_a_frame_or_nan(way):
    """X = U (1 - t) + noise: frames to 1e-5 while float64 can tell, NaN from there on, and nothing in between."""
    finite = []
    for noise in (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 0.0):
        options = settings(
            "stiefel-spectron", lr=1.0, renormalize=False, retraction=way, momentum=0.0, orthogonalizer="none"
        )
        made, g = unit("stiefel-spectron", options, torch.float32, (96, 64, 16)), torch.Generator().manual_seed(2)
        grads = [w + noise * torch.randn(w.shape, generator=g) for w in made.weights[:2]]
        grads = [x * torch.linspace(0, 1, 16) for x in grads] + [torch.zeros_like(made.weights[2])]
        cluster = Cluster(made, MANY)
        cluster.step(grads)
        for i in (0, 1):
            worst = error(cluster.weight(i))
            assert (worst.isnan() | (worst <= 1e-5)).all()
            finite.append((noise, bool(worst.isfinite().all())))
    assert all(good for noise, good in finite if noise >= 1e-3) and not any(good for noise, good in finite if not noise)


def test_what_has_no_form_on_shards_is_refused_with_the_reason():
    for rule in AXES:
        assert refusal(rule, least(rule)) is None
    for rule in ("sct", "stiefel-spectron"):
        assert "cayley" in refusal(rule, settings(rule, retraction="cayley"))
    assert "certified" in refusal("stiefel-spectron", settings("stiefel-spectron", certified=True))
    assert refusal("spectron", settings("spectron", certified=True)) is None
    assert "element" in refusal("adamw", settings("adamw"))


@pytest.mark.parametrize("case", ONES, ids=named)
def test_no_units_at_all_are_a_stack_as_well(case):
    """As whoever solves none has it, and as bytes are predicted."""
    rule, changes = case
    shapes = [(96, 16), (16, 64), (16,)][: RULES[rule].width]
    for kept in ("fp32", "bf16"):
        options = settings(rule, state_dtype=kept, **changes)
        found = per_unit(rule, tuple(shapes), torch.float32, tuple(options.items()))
        nothing = rule in ("muon", "adam-muon") and changes.get("orthogonalizer") == "none"
        assert found.parts > 0 or nothing
        assert (found.sums > 0) == (rule == "tsvd" or bool(changes.get("riemannian")))
    assert per_unit("muon", ((96, 16),), torch.float32, tuple(settings("muon").items())) == (4 * 136, 4 * 136, 0)
