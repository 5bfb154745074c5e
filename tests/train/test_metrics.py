"""metrics.jsonl: the documented keys, JSON only, one row a step."""

import json
import math
import re

import pytest

from nativerank.train import metrics
from nativerank.train.loop import train
from nativerank.train.metrics import JsonLines, read_rows

STEP_KEYS = {
    "step", "tokens", "loss", "lr", "aux_lr", "grad_norm", "tokens_per_second", "seconds", "optimizer_share",
    "train_flops",
}  # fmt: skip
PROBE_KEYS = {
    "update_norm", "sigma_W", "stable_rank", "sigma_A", "sigma_B", "gauge", "output_change", "rho", "update_ratio",
}  # fmt: skip
END_KEYS = {
    "event", "step", "tokens", "val_loss", "perplexity", "bits_per_byte", "xz_bits_per_byte", "val_tokens", "prompt",
    "sample", "seconds", "peak_memory_bytes", "refused_steps", "parameters", "train_flops", "ranks", "out",
}  # fmt: skip


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def rows(tmp_path, run_config, listen, known):
    """Of a run of 8 steps with accumulation 2; made once."""
    if not known:
        common = dict(train__accumulation=2, train__eval_every=4, train__probe_every=4, train__eval_tokens=100)
        train(run_config(out=tmp_path / "run", **common), listen())
        known["rows"] = read_rows(tmp_path / "run")
    return known["rows"]


def test_a_run_begins_and_ends_with_an_event(rows):
    assert [r["event"] for r in rows if "event" in r] == ["start", "end"]
    assert rows[0]["event"] == "start" and rows[-1]["event"] == "end"
    assert set(rows[-1]) == END_KEYS
    assert {"nativerank", "commit", "torch", "transformers", "python", "machine"} == set(rows[0]["environment"])
    assert rows[0]["parameters"]["total"] > rows[0]["parameters"]["non_embedding"] > 0
    assert rows[0]["factorized"] == 14


def test_every_step_has_the_documented_keys(rows):
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    for row in steps:
        assert set(row) - {"val_loss", "probes"} == STEP_KEYS
        assert row["tokens"] == row["step"] * 2 * 2 * 16
        assert 0 < row["optimizer_share"] < 1 and row["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
        assert row["aux_lr"] / row["lr"] == pytest.approx(0.003 / 0.07)
    documented = set(re.findall(r"\w+", metrics.__doc__))
    assert STEP_KEYS | {"val_loss", "probes", "event", "action", "rolled_back_to"} | PROBE_KEYS <= documented


def test_validations_and_probes_come_at_their_intervals(rows):
    assert [r["step"] for r in rows if "val_loss" in r] == [4, 8]  # the last one is the end's
    assert [r["step"] for r in rows if "probes" in r] == [4, 8]
    probes = next(r for r in rows if "probes" in r)["probes"]
    first, middle, last = probes
    assert first.endswith("layers.0.self_attn.q_proj") and last.endswith("layers.1.mlp.down_proj")
    assert middle.endswith("layers.1.self_attn.q_proj")
    for values in probes.values():
        assert set(values) == PROBE_KEYS
        assert values["sigma_W"] <= values["sigma_A"] * values["sigma_B"] * (1 + 1e-5)  # float32


def test_rho_is_what_the_rule_says(rows):
    """rho = lr / (sigma_A + sigma_B + 1), with norms of before the step: close to those recorded after it."""
    row = next(r for r in rows if "probes" in r)
    for values in row["probes"].values():
        expected = row["lr"] / (values["sigma_A"] + values["sigma_B"] + 1)
        assert values["rho"] == pytest.approx(expected, rel=0.1)


def test_what_is_not_finite_stays_json(tmp_path):
    lines = JsonLines(tmp_path, 0)
    lines.row({"step": 1, "loss": math.nan, "probes": {"a": {"rho": -math.inf}}})
    lines.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row == {"step": 1, "loss": "nan", "probes": {"a": {"rho": "-inf"}}}


def test_resuming_drops_what_follows_the_checkpoint_and_half_a_line(tmp_path):
    lines = JsonLines(tmp_path, 0)
    for step in range(1, 6):
        lines.row({"step": step})
    lines.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')
    JsonLines(tmp_path, 3).close()
    assert read_rows(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path):
    lines = JsonLines(tmp_path, 0)
    lines.row({"step": 1})
    assert read_rows(tmp_path) == [{"step": 1}]
    lines.close()


def test_a_profile_is_a_trace_and_a_table(tmp_path, run_config, listen):
    train(run_config(out=tmp_path / "run", profile=True, train__steps=11), listen())
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    assert len(trace["traceEvents"]) > 100
    table = (tmp_path / "run/profile/table.txt").read_text()
    assert "Self CPU" in table and "aten::mm" in table


@pytest.mark.parametrize(("steps", "there"), [(4, False), (5, True)])
def test_a_run_too_short_for_a_profile_says_so(tmp_path, run_config, listen, steps, there):
    listener = listen()
    summary = train(run_config(out=tmp_path / "run", profile=True, train__steps=steps), listener)
    assert (tmp_path / "run/profile/parts.txt").exists() == ("profile" in summary) == there
    said = [message for message in listener.said if message.startswith("profile: ")]
    assert said == ([] if there else ["profile: it takes 5 steps or more, and 4 are to come: none"])


def test_a_profile_does_not_change_the_run(tmp_path, run_config, listen, fingerprint):
    train(run_config(out=tmp_path / "a", profile=True), listen())
    assert (tmp_path / "a/profile/trace.json").exists()
    train(run_config(out=tmp_path / "b"), listen())
    assert fingerprint(tmp_path / "a", 8) == fingerprint(tmp_path / "b", 8)
