"""bench step70b at small sizes: the record's shape, equal losses, a literal form that makes the same step."""

import json

import pytest
import torch

from nativerank.bench import step70b
from nativerank.bench.stack70b import PHASES, STATES, Session, Variant, frame_error, measure
from nativerank.bench.step70b import bench_step70b, literal_step, race_literal

SMALL = {"layers": 2, "d_model": 256, "d_ffn": 512, "heads": 8, "rank": 8, "tokens": 4}


@pytest.fixture
def small(monkeypatch):
    """Variants of the benchmark at these sizes."""
    monkeypatch.setattr(step70b, "Variant", lambda **named: Variant(**{**named, **SMALL}))


@pytest.mark.parametrize("attention", ["simplified", "real"])
@pytest.mark.parametrize("state", STATES)
def test_layerwise_losses_are_the_plain_ones(attention, state):
    plain, layerwise = (
        measure(Variant(layerwise=on, state=state, attention=attention, gqa=True, **SMALL), steps=3)
        for on in (False, True)
    )
    assert plain["losses"] == layerwise["losses"]
    assert plain["losses"][2] < plain["losses"][0]  # it does descend the sum of its outputs
    assert max(plain["frame_error"], layerwise["frame_error"]) < 1e-5
    for found in (plain, layerwise):
        assert all(found["seconds"][phase] > 0 for phase in PHASES)
        assert found["seconds"]["step"] == pytest.approx(sum(found["seconds"][phase] for phase in PHASES))


def test_both_attentions_hold_the_same_factors():
    sizes = {measure(Variant(attention=a, **SMALL), steps=1)["factor_parameters"] for a in ("simplified", "real")}
    per_block = 8 * (4 * (256 + 256 + 1) + 3 * (256 + 512 + 1))
    assert sizes == {2 * per_block}


def test_the_literal_form_makes_the_same_step():
    ours, literal = Session(Variant(**SMALL)), Session(Variant(**SMALL))
    for group in literal.optimizer.param_groups:
        assert group["weight_decay"] == 0
    losses = [(ours.step(), literal_step(literal)) for _ in range(3)]
    for one, other in losses:
        assert one == pytest.approx(other, rel=1e-5)
    for p, q in zip(ours.model.parameters(), literal.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert frame_error(literal.model) < 1e-5


def test_a_race_has_medians_and_ratios():
    found, *_ = race_literal(Variant(**SMALL), repeats=3)
    assert found["threads"] == 1
    assert set(found["ratio"]) == {*PHASES, "step"} and all(r > 0 for r in found["ratio"].values())
    assert found["ours"]["step"] > found["ours"]["retraction"] > 0


def test_a_fresh_process_measures_itself(small):
    result = bench_step70b(layerwise=True)
    (variant,) = result["cases"]
    assert variant["base_rss_bytes"] > 5e7
    assert variant["peak_rss_bytes"] > variant["base_rss_bytes"] + 12 * variant["factor_parameters"]
    assert result["literal"] == []
    assert json.loads(json.dumps(result))["arithmetic"]["matrices"][-1]["model"] == "LLaMA-70B"


def test_a_process_that_dies_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ValueError, match="ended with 1: killed, so probably out of memory"):
        bench_step70b()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--tokens", "0"], "--tokens must be at least 1, got 0"), (["--layers", "-1"], "--layers must be at least 1")],
)
def test_bad_sizes_are_named(cli, words, message):
    result = cli("bench", "step70b", *words)
    assert result.code == 2 and message in result.err


def test_the_command_shows_what_was_measured(small, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(step70b, "in_a_fresh_process", measure)
    file = tmp_path / "record.json"
    shown = cli("bench", "step70b", "--layerwise", "--state", "bf16", "--literal", "--repeats", "1")
    assert shown.code == 0
    for word in ("199.1", "1,245 GB", "7.21 GB", "6.63 GB", "layer-wise", "bf16", "left out: activations"):
        assert word in shown.out
    assert cli("bench", "step70b", "--json", file).code == 0
    assert json.loads(file.read_text())["benchmark"] == "step70b"
