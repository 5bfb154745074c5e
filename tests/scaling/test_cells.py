"""From a design to runs: the paper's step counts, budgets by either convention, rates, and families of models."""

import json
from dataclasses import replace

import pytest

from nativerank.accounting.hardware import find_device
from nativerank.experiments.arms import Arm, Value, parse_arms, with_ratios
from nativerank.models import find_preset
from nativerank.plan.make import Request
from nativerank.scaling.cells import plan_cells, seconds_on
from nativerank.scaling.design import Design, family_sizes
from nativerank.scaling.grids import GRIDS, find_grid

# From the scripts of the Spectron paper, sizes 47.5M to 1495.2M; the last budget has no runs of the two smallest.
STEPS = {
    2.2e18: [7368, 5154, 3736, 3462, 2441, 1740, 1178, 770, 723, 448, 371, 234],
    5.57e18: [18654, 13050, 9459, 8765, 6181, 4407, 2982, 1951, 1831, 1134, 939, 592],
    1.41e19: [47222, 33036, 23944, 22187, 15647, 11155, 7548, 4938, 4636, 2870, 2376, 1499],
    3.57e19: [60624, 56176, 39617, 28243, 19110, 12503, 11737, 7268, 6016, 3795],
}
MILLIONS = [47.5, 67.8, 93.6, 101.0, 143.2, 200.9, 296.9, 453.8, 483.5, 780.8, 943.2, 1495.2]
SPECTRON = with_ratios(parse_arms("spectron"), (Value(0.25),))[0]
DENSE = Arm("dense-muon", "dense-muon")


@pytest.fixture
def design():
    return Design(("pocket@64x2", "pocket@96x3"), (1e12, 3e12), (DENSE, SPECTRON))


def test_the_grid_of_the_paper_has_its_sizes_and_steps():
    cells = plan_cells(find_grid("spectron"))
    assert len(cells) == 46
    assert [round(cell.params["total"] / 1e6, 1) for cell in cells[:12]] == MILLIONS
    for budget, steps in STEPS.items():
        assert [cell.steps for cell in cells if cell.budget == budget] == steps
    assert {cell.tokens // cell.steps for cell in cells} == {512 * 2048}


@pytest.mark.parametrize("name", GRIDS)
def test_named_grids_survive_the_file_and_spend_their_budgets(name):
    design = find_grid(name)
    assert Design.from_dict(json.loads(json.dumps(design.as_dict(), allow_nan=False))) == design
    cells = plan_cells(design)
    low, high = design.tokens_per_param
    for cell in cells:
        assert cell.flops[design.convention] == pytest.approx(cell.budget, rel=0.5 / cell.steps + 1e-4)
        assert low <= cell.tokens / cell.params[design.count] <= high * 1.001
    for arm in design.arms:
        for budget in design.budgets:
            of = [c for c in cells if c.budget == budget and c.method == arm.method]
            assert len({c.params["total"] for c in of}) >= 5, "IsoFLOP parabolas want sizes on both sides"


def test_both_conventions_are_counted_whatever_the_budget_is(design):
    for count in ("total", "non_embedding"):
        six = plan_cells(replace(design, count=count))
        exact = plan_cells(replace(design, count=count, convention="exact"))
        for a, b in zip(six, exact, strict=True):
            assert a.flops["6nd"] == 6 * a.params[count] * a.tokens
            assert a.flops["exact"] / a.tokens == pytest.approx(b.flops["exact"] / b.tokens)
            assert b.flops["exact"] == pytest.approx(b.budget, rel=0.5 / b.steps + 1e-9)
            assert a.params == b.params and a.lr == b.lr


def test_cells_are_named_by_what_they_train_alone(design):
    names = [cell.cell.name for cell in plan_cells(design)]
    assert len(set(names)) == len(names) == 8
    more = plan_cells(replace(design, budgets=(3e12, 9e12, 1e12), sizes=("pocket@128x4", *design.sizes)))
    assert set(names) < {cell.cell.name for cell in more}
    other = plan_cells(replace(design, common={"train.batch_size": 4, "train.accumulation": 2}))
    assert not set(names) & {cell.cell.name for cell in other}


def test_rates_follow_the_rule_and_its_multiples(design):
    start = {cell.method: cell.lr for cell in plan_cells(design)}
    found = plan_cells(replace(design, lrs=(Value(0.5, True), Value(1, True), Value(2, True)), lr_exponent=-1.0))
    for cell in found:
        assert cell.lr in {
            float(f"{start[cell.method] * 128 / width * factor:.3g}") for width in (64, 96) for factor in (0.5, 1, 2)
        }
    assert len(found) == 24 and len({cell.cell.name for cell in found}) == 24
    assert {cell.lr for cell in plan_cells(replace(design, lrs=(Value(0.3),)))} == {0.3}
    seeds = plan_cells(replace(design, seeds=2))
    assert [cell.seed for cell in seeds[:2]] == [0, 1] and seeds[0].lr == seeds[1].lr


def test_a_family_keeps_its_aspect():
    assert family_sizes("pocket", (64, 96, 128)) == ("pocket@64x2", "pocket@96x3", "pocket@128x4")
    assert family_sizes("pocket", (64, 128), 16) == ("pocket@64x4", "pocket@128x8")
    with pytest.raises(ValueError, match="multiple of the preset's head size 32, got 65"):
        family_sizes("pocket", (65,))


def test_a_config_file_is_a_size(design, tmp_path):
    file = tmp_path / "config.json"
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    file.write_text(json.dumps(text | {"num_attention_heads": 2, "vocab_size": 1024, "max_position_embeddings": 128}))
    cells = plan_cells(replace(design, sizes=(str(file),)))
    assert dict(cells[0].cell.settings)["model.config"] == str(file)
    with pytest.raises(ValueError, match="--lr_exponent needs presets"):
        plan_cells(replace(design, sizes=(str(file),), lr_exponent=0.5))


def test_time_on_a_device_grows_with_the_budget_and_never_beats_its_peak(design):
    cells = plan_cells(design)
    seconds = seconds_on(cells, Request("h100-sxm", search=False))
    peak = find_device("h100-sxm").bf16_flops
    for cell, time in zip(cells, seconds, strict=True):
        assert time > cell.flops["exact"] / peak
    # Equal models, three times the steps.
    assert seconds[2] / seconds[0] == pytest.approx(cells[2].steps / cells[0].steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": ()}, "a sweep needs budgets: give --budgets"),
        ({"arms": ()}, "a sweep needs arms: give --methods"),
        ({"sizes": ("pocket", "pocket")}, "names one of its sizes twice"),
        ({"convention": "7nd"}, "convention and count are"),
        ({"tokens_per_param": (3.0, 2.0)}, "LOW below HIGH, got 3,2"),
    ],
)
def test_what_cannot_be_is_said_at_once(design, change, message):
    with pytest.raises(ValueError, match=message):
        replace(design, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (1e6,)}, "a budget of 1e\\+06 FLOPs is less than one step of dense-muon at pocket@64x2"),
        ({"tokens_per_param": (1e6, 1e7)}, "no cell of the sweep has 1e\\+06 to 1e\\+07 tokens per parameter"),
        ({"sizes": ("poket",)}, "dense-muon at poket: unknown preset 'poket'"),
    ],
)
def test_what_cannot_run_is_named(design, change, message):
    with pytest.raises(ValueError, match=message):
        plan_cells(replace(design, **change))


def test_a_preset_at_another_size_keeps_its_shape():
    base, wide = find_preset("pocket"), find_preset("pocket@256x8-dense")
    assert (wide.d_model, wide.layers, wide.heads) == (256, 8, 8) and wide.method == "dense-adamw"
    assert wide.d_ffn / wide.d_model == base.d_ffn / base.d_model
    assert find_preset("spectron-s@1280x20").d_ffn == find_preset("spectron-m").d_ffn
    assert find_preset("spectron-s@1536x24").d_ffn == find_preset("spectron-l").d_ffn
    assert find_preset("pocket@96") == replace(base, d_model=96, heads=3, d_ffn=256, value=24)
    assert find_preset("pocket@96x3x6").heads == 6
    grouped = find_preset("smollm2-135m@320x4")
    assert grouped.heads % grouped.kv_heads == 0
    for name in ("pocket@", "pocket@x3", "pocket@64x", "pocket@0x3", "pocket@64x2x3x4", "pocket@64x2x24"):
        with pytest.raises(ValueError, match=name):
            find_preset(name)
