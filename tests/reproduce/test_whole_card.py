"""A card from the command line to its page, every run a real one of a few steps."""

import json

import pytest
import yaml

from nativerank.cli.main import main

pytestmark = pytest.mark.slow
ARMS = ["sct[rank.value=2]", "sct[rank.value=4]"]


def test_a_card_runs_is_rendered_and_is_up_to_date_afterwards(root, tmp_path, monkeypatch, capfd):
    probes = {"train.probe": ["*.0.self_attn.o_proj"], "train.probe_every": 1}
    scales = yaml.safe_load((root / "scales.yaml").read_text())
    scales["scales"]["pocket"]["settings"] |= probes
    scales["scales"]["pocket"]["seeds"] = 2
    (root / "scales.yaml").write_text(yaml.safe_dump(scales))
    races = {
        "scratch": {"arms": ARMS, "multiples": [1, 0.25]},
        "converted": {"arms": ARMS, "converted": "dense-adamw", "horizons": [4]},
        "dense": {"arms": ["dense-adamw"]},
    }
    claims = {name: {"says": "It is so", "source": "a paper"} for name in ("floor", "middle", "rate")}
    measures = {"plan": "plan --model.preset pocket --on l4"}
    card = {"title": "Ranks", "claims": claims, "scales": {"pocket": {"races": races, "measures": measures}}}
    (root / "sct-ranks").mkdir()
    (root / "sct-ranks" / "config.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.chdir(root.parent)
    assert main(["reproduce", "--jobs", "2", "--quiet", "--json", "found.json"]) == 0, capfd.readouterr().err
    result = json.loads((root / "sct-ranks" / "result.json").read_text())["pocket"]
    converted = result["races"]["converted"]["horizons"]["4"]["arms"]
    scratch = result["races"]["scratch"]["horizons"]["4"]
    for arm in ARMS:
        assert (
            len(converted[arm]["val_losses"]) == 2
            and converted[arm]["parameters"] == scratch["arms"][arm]["parameters"]
        )
        assert scratch["norms"][arm]["0.25"]["course"]["update_norm"]
    assert result["measures"]["plan"]["params"]["total"] > 0
    assert str(tmp_path) not in json.dumps(result["races"])
    assert json.loads((root.parent / "found.json").read_text())["sct-ranks"]["pocket"].keys() == claims.keys()
    page = (root / "sct-ranks" / "card.md").read_text()
    assert "stale" not in page and "`sct[rank.value=2]`" in page
    before = (root / "sct-ranks" / "result.json").read_bytes()
    capfd.readouterr()
    assert main(["reproduce", "--jobs", "2"]) == 0
    assert "sct-ranks: up to date" in capfd.readouterr().out
    assert (root / "sct-ranks" / "result.json").read_bytes() == before
