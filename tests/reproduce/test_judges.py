"""Every judge on results whose truth is known: as claimed, and the other way round."""

import pytest
from made import arm, at, race, seen

from nativerank.experiments.arms import LR
from nativerank.reproduce.cards import (
    ablation,
    dense_parity,
    judge_of,
    method_order,
    naive_instability,
    one_rate,
    ours,
    overhead,
    scaling_laws,
    sct_memory,
    sct_ranks,
    sct_retraction,
    spectron_bounds,
    tsvd,
)
from nativerank.reproduce.race import capped_label
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE

H = (150, 450)


def words(verdicts):
    return {claim: verdict.word for claim, verdict in verdicts.items()}


def everywhere(losses, **changes):
    return race({steps: losses for steps in H}, **changes)


def norms(naive, dense, spectron=0.01, muon=0.02, losses=((3.0,), (5.0,))):
    low, high = losses

    def of(values, lr=0.1):
        return {str(m): at(v, lr, low * 3 if m == 1 else high * 3) for m, v in zip((1, 4, 8), values, strict=True)}

    found = {"lowrank-adamw": of(naive), "dense-adamw": of(dense), "spectron": of([spectron] * 3)}
    return found | {"lowrank-muon": of([muon] * 3), capped_label("lowrank-adamw"): {"1": at(0.01, 0.1, low * 3)}}


def test_naive_instability():
    losses = {"lowrank-adamw": 3.0, "dense-adamw": 3.0, "spectron": 3.0}
    as_claimed = seen({"rates": everywhere(losses, norms=norms([0.2, 0.4, 0.8], [0.01] * 3))})
    assert words(naive_instability.judge(as_claimed)) == {"blow-up": REPRODUCED, "cause": REPRODUCED}
    tame = seen({"rates": everywhere(losses, norms=norms([0.01, 0.04, 0.08], [0.01] * 3))})
    assert naive_instability.judge(tame)["blow-up"].word == DIRECTION
    same = seen({"rates": everywhere(losses, norms=norms([0.01] * 3, [0.01] * 3))})
    assert naive_instability.judge(same)["blow-up"].word == NOT
    mixed = everywhere(losses, norms=norms([0.01] * 3, [0.01] * 3))
    mixed["horizons"]["450"]["norms"] = norms([0.03] * 3, [0.01] * 3)
    assert naive_instability.judge(seen({"rates": mixed}))["blow-up"].word == NOT, "at one horizon only"
    useless = norms([0.2] * 3, [0.01] * 3)
    useless[capped_label("lowrank-adamw")] = {"1": at(0.01, 0.1, (5.0,) * 3)}
    assert naive_instability.judge(seen({"rates": everywhere(losses, norms=useless)}))["cause"].word == NOT
    nothing = seen({"rates": everywhere(losses)})
    assert set(words(naive_instability.judge(nothing)).values()) == {UNTESTABLE}


def test_spectron_bounds():
    losses = {"lowrank-adamw": 3.0, "lowrank-muon": 3.0, "spectron": 3.0}
    ordered = seen({"rates": everywhere(losses, norms=norms([0.5] * 3, [0.1] * 3))})
    assert set(words(spectron_bounds.judge(ordered)).values()) == {REPRODUCED}
    over = seen({"rates": everywhere(losses, norms=norms([0.5] * 3, [0.1] * 3, spectron=0.3, muon=0.2))})
    found = words(spectron_bounds.judge(over))
    assert found == {"update": DIRECTION, "activations": DIRECTION, "weights": DIRECTION, "bound": NOT}


def test_method_order():
    better = everywhere({"spectron": 2.9, "self-guided": 3.0, "lowrank-adamw": 3.02})
    found = words(method_order.judge(seen({"S": better, "M": better})))
    assert found == {"self-guided": REPRODUCED, "naive": REPRODUCED, "order": REPRODUCED, "downstream": UNTESTABLE}
    worse = everywhere({"spectron": 3.1, "self-guided": 3.0, "lowrank-adamw": 2.9})
    found = words(method_order.judge(seen({"S": better, "M": worse})))
    assert found == {"self-guided": NOT, "naive": NOT, "order": NOT, "downstream": UNTESTABLE}
    slight = everywhere({"spectron": 2.98, "self-guided": 3.0, "lowrank-adamw": 3.02})
    assert method_order.judge(seen({"M": slight}))["self-guided"].word == DIRECTION


def parity(spectron, dense, small, seconds=(1.0, 1.0)):
    tokens = everywhere({"spectron": spectron, "dense-adamw": dense + 0.1, "dense-muon": dense})
    flops = race(
        {
            s: {"spectron": spectron, "dense-adamw": arm(dense + 0.3, s // 2), "dense-muon": arm(dense + 0.2, s // 2)}
            for s in H
        }
    )
    parameters = everywhere({"dense-adamw": small, "dense-muon": small})
    times = {"spectron": seconds[0], "dense-adamw": seconds[1], "dense-muon": seconds[1]}
    return seen(
        {"tokens": tokens, "flops": flops, "parameters": parameters}, {"steps": {"cases": [{"seconds": times}]}}
    )


def test_dense_parity():
    assert set(words(dense_parity.judge(parity(2.9, 3.0, 3.1))).values()) == {REPRODUCED}
    assert set(words(dense_parity.judge(parity(3.5, 3.0, 3.1))).values()) == {NOT}
    found = words(dense_parity.judge(parity(3.1, 3.0, 3.0)))  # behind at equal tokens, ahead at equal FLOPs
    assert found == {"equal-flops": REPRODUCED, "equal-time": NOT, "equal-parameters": NOT}


def test_at_equal_time_the_longer_side_is_cut():
    fast = parity(3.0, 3.0, 3.1, seconds=(0.5, 1.0))  # 450 steps in the time of 225 dense ones
    (_, words_) = dense_parity.at_equal_time(fast, "dense-muon")
    assert "450 steps against 225 of dense-muon" in words_
    (_, words_) = dense_parity.at_equal_time(parity(3.0, 3.0, 3.1, seconds=(2.0, 1.0)), "dense-muon")
    assert "225 steps against 450 of dense-muon" in words_


def plans(spectron_share, guided, naive, dense):
    def of(flops):
        return {"flops": {"per_token": {"exact": flops}, "optimizer_over_exact": spectron_share}}

    layer = {"part": "layer", "d_model": 1024, "tokens_per_step": 8192}
    timed = {"case": layer, "ratio": {name: 0.02 for name in ("spectron", "certified", "exact", "plain")}}
    step = {"case": {"tokens": 1024}, "seconds": {"spectron": 1.1, "lowrank-adamw": 1.0}}
    plan = {"spectron": of(naive), "self-guided": of(guided), "naive": {**of(naive), "dense": of(dense)}}
    return seen(measures={**plan, "optimizer": {"cases": [timed]}, "steps": {"cases": [step]}})


def test_overhead():
    assert words(overhead.judge(plans(0.001, 1.25, 1.0, 1.5))) == {"spectron": REPRODUCED, "self-guided": REPRODUCED}
    assert words(overhead.judge(plans(0.02, 1.9, 1.0, 1.5))) == {"spectron": NOT, "self-guided": DIRECTION}


def test_ablation():
    update = {ablation.BOTH: 3.0, ablation.ORTHOGONAL: 3.04, ablation.RENORMAL: 3.2, ablation.NEITHER: 6.0}
    ratios = {ablation.BOTH: 3.0, ablation.LOW: 3.7, ablation.HIGH: 2.99}
    found = ablation.judge(seen({"update": everywhere(update), "ratio": everywhere(ratios)}))
    assert set(words(found).values()) == {REPRODUCED}
    slight = {**update, ablation.RENORMAL: 3.05, ablation.NEITHER: 3.1}
    found = words(ablation.judge(seen({"update": everywhere(slight), "ratio": everywhere(ratios)})))
    assert found["orthogonalise"] == found["neither"] == DIRECTION
    update, ratios = dict.fromkeys(update, 3.0), {ablation.BOTH: 3.0, ablation.LOW: 2.9, ablation.HIGH: 2.5}
    found = ablation.judge(seen({"update": everywhere(update), "ratio": everywhere(ratios)}))
    assert set(words(found).values()) == {NOT}


@pytest.mark.parametrize(
    ("rates", "word"), [((0.1, 0.1, 0.16), REPRODUCED), ((0.1, 0.1, 0.25), DIRECTION), ((0.1, 0.1, 0.6), NOT)]
)
def test_one_rate(rates, word):
    def of(rate):
        best = {LR: rate}
        return race({150: {name: arm(3.0, best=best) for name in ("spectron", "lowrank-adamw")}})

    sizes = dict(zip("SML", map(of, rates), strict=True))
    assert one_rate.judge(seen(sizes))["one-rate"].word == word
    assert one_rate.judge(seen({"S": of(0.1)}))["one-rate"].word == UNTESTABLE


def sweep(n, interval, saving, band):
    groups = {
        method: {"method": method, "isoflop": {"n_exponent": n, "n_interval": interval}}
        for method in scaling_laws.PAPER
    }
    known = {
        "at_budget": saving,
        "interval": band,
        "budget": 1e12,
        "at_last": 0.48,
        "at_last_if_meeting_at_2.2e18": 0.18,
    }
    return seen(sweeps={"sweep": {"runs": [], "groups": groups, "saving": known}})


def test_scaling_laws():
    assert set(words(scaling_laws.judge(sweep(0.48, [0.4, 0.55], 0.45, [0.4, 0.55]))).values()) == {REPRODUCED}
    assert words(scaling_laws.judge(sweep(0.7, [0.65, 0.75], 0.2, [0.1, 0.3]))) == {
        "exponents": NOT,
        "saving": DIRECTION,
    }
    assert set(words(scaling_laws.judge(sweep(0.5, [0.1, 0.9], 0.2, [-0.5, 0.6]))).values()) == {UNTESTABLE}


def test_tsvd():
    def of(fixed, adaptive, dense, naive, share):
        arms = {
            "tsvd": arm(fixed, flops_per_token=share),
            "dense-adamw": arm(dense, flops_per_token=1.0),
            "lowrank-adamw": naive,
        }
        return seen(
            {"tokens": everywhere(arms), "adaptive": everywhere({tsvd.ADAPTIVE: adaptive, "dense-adamw": dense})}
        )

    assert set(words(tsvd.judge(of(2.9, 2.9, 3.0, 3.1, 0.6))).values()) == {REPRODUCED}
    assert set(words(tsvd.judge(of(3.2, 3.3, 3.0, 3.1, 1.2))).values()) == {NOT}
    worse = words(tsvd.judge(of(3.2, 3.3, 3.0, 3.1, 0.6)))
    assert worse["less-compute"] == DIRECTION, "fewer FLOPs to a higher loss are no saving"


def steps70b(plain, layerwise, saved=0.5, ratio=199.1):
    def of(peak):
        matrix = {"model": "LLaMA-70B", "ratio": ratio, "dense_bytes": 3.758e9, "factored_bytes": 1.89e7, "rank": 32}
        return {"cases": [{"peak_rss_bytes": peak}], "arithmetic": {"matrices": [matrix]}}

    plan = {"bytes": {"peak": 1e10 * (1 - saved)}, "dense": {"bytes": {"peak": 1e10}}}
    return seen(measures={"plain": of(plain), "layerwise": of(layerwise), "half": of(layerwise), "smollm": plan})


def test_sct_memory():
    found = words(sct_memory.judge(steps70b(7e9, 6e9)))
    assert found == {"matrix": REPRODUCED, "step": REPRODUCED, "model": DIRECTION, "speed": UNTESTABLE}
    found = words(sct_memory.judge(steps70b(9e9, 6e9, 0.3, 150.0)))
    assert found == {"matrix": NOT, "step": DIRECTION, "model": NOT, "speed": UNTESTABLE}
    assert words(sct_memory.judge(steps70b(9e9, 8e9)))["step"] == NOT


@pytest.mark.parametrize(("share", "word"), [(0.45, REPRODUCED), (0.3, DIRECTION), (0.1, NOT)])
def test_sct_retraction(share, word):
    times = {"step": 1.0, "retraction": share}
    record = {"literal": [{"threads": 1, "literal": times, "ours": times, "ratio": {"step": 0.5}}]}
    assert sct_retraction.judge(seen(measures={"literal": record}))["share"].word == word


def ranks(losses, off):
    arms = dict(zip(map(sct_ranks.arm, sct_ranks.RANKS), losses, strict=True))
    rates = {
        name: {"1": at(0.1, losses=[loss] * 3), "0.25": at(0.1, losses=[loss + off] * 3)} for name, loss in arms.items()
    }
    return seen({"scratch": everywhere(arms, norms=rates), "converted": race({150: arms})})


def test_sct_ranks():
    flat = words(sct_ranks.judge(ranks((3.0, 3.0, 2.98, 3.0), 0.2)))
    assert flat == {"floor": REPRODUCED, "middle": REPRODUCED, "rate": REPRODUCED}
    near = words(sct_ranks.judge(ranks((2.95, 2.98, 2.99, 3.0), 0.2)))
    assert near["floor"] == DIRECTION, "not apart in this direction, and not the same either"
    assert near["middle"] == NOT, "the smallest rank is best"
    falling = words(sct_ranks.judge(ranks((3.4, 3.3, 3.2, 3.1), 0.1)))
    assert falling == {"floor": NOT, "middle": NOT, "rate": NOT}


def test_sct_ranks_tells_the_search():
    cells = [{LR: lr, "seed": seed, "val_loss": 3.0 + lr + seed} for lr in (0.1, 0.2) for seed in (0, 1)]
    cells.append({LR: 0.4, "seed": 0, "diverged": "x"})
    arms = {sct_ranks.arm(rank): arm(3.0, tried=cells) for rank in sct_ranks.RANKS}
    told = sct_ranks.tell(seen({race_: race({150: arms}) for race_ in sct_ranks.RACES}))
    assert "scratch, 150 steps, loss of the first seed by rate:" in told
    assert told.count("| 0.1 | 3.1000 | 3.1000 | 3.1000 | 3.1000 |") == 2 and not any("0.4" in line for line in told)


def test_ours():
    forms = [{"form": "paper", "max_ratio": 2.0, "cases": 10}, {"form": "certified", "max_ratio": 0.999, "cases": 10}]
    losses = {"adam-muon": 2.9, "lowrank-muon": 3.0, "stiefel-spectron": 2.9, "spectron": 3.0}

    def of(forms, losses, adaptive):
        races = {
            "tokens": everywhere(losses),
            "adaptive": everywhere({ours.ADAPTIVE: adaptive, "spectron": losses["spectron"]}),
        }
        return words(ours.judge(seen(races, {"bound": {"cases": forms}})))

    assert set(of(forms, losses, 3.0).values()) == {REPRODUCED}
    forms[1]["max_ratio"] = 1.01
    assert set(of(forms, {**losses, "adam-muon": 3.1, "stiefel-spectron": 3.1}, 3.2).values()) == {NOT}


def test_a_card_without_a_judge_is_an_error():
    with pytest.raises(ValueError, match="no judge for the card nothing-here"):
        judge_of("nothing-here")
