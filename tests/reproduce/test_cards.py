"""Cards and scales are read strictly, and errors name the file and the key."""

import pytest
import yaml

from nativerank.reproduce.card import card_names, chosen, read_card, read_scales


def test_every_arm_scale_and_claim_of_a_card_is_read(write_card):
    card = write_card("ablation", ["ratio"], races={"one": {"arms": ["spectron"], "multiples": [1, 4]}})
    assert card.scales["pocket"].races["one"].multiples == [1.0, 4.0]
    assert list(card.claims) == ["ratio"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"titel": "x"}, "titel"),
        ({"title": 3}, "title"),
        ({"claims": {"a": {"says": "x"}}}, "claims.a.source"),
        ({"scales": {"pocket": {"races": {"r": {"arms": "spectron"}}}}}, "scales.pocket.races.r.arms"),
        ({"scales": {"pocket": {"races": {"r": {"arms": [], "budget": "time"}}}}}, "budget"),
        ({"scales": {"pocket": {"races": {"r": {"arms": [], "settings": {"optim.lrr": 1}}}}}}, "optim.lrr"),
        ({"scales": {"pocket": {"sweeps": {"s": {"sizes": []}}}}}, "scales.pocket.sweeps.s.budgets"),
    ],
)
def test_what_is_wrong_is_named(root, write_card, change, named):
    write_card("ablation", ["ratio"])
    file = root / "ablation" / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **change}))
    with pytest.raises(ValueError, match=named) as error:
        read_card(root / "ablation")
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", ["", "[1", "- a\n", "a: b: c"])
def test_a_damaged_file_is_named(root, write_card, text):
    write_card("ablation", ["ratio"])
    file = root / "ablation" / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="config"):
        read_card(root / "ablation")


def test_unknown_settings_of_a_scale_are_an_error(root):
    file = root / "scales.yaml"
    values = yaml.safe_load(file.read_text())
    values["scales"]["pocket"]["settings"]["train.stepz"] = 1
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"train\.stepz"):
        read_scales(root)


def test_cards_are_chosen_by_name(root, write_card, tmp_path):
    write_card("ablation", [])
    write_card("tsvd", [])
    assert chosen(root, []) == ["ablation", "tsvd"] == card_names(root)
    assert chosen(root, ["tsvd"]) == ["tsvd"]
    with pytest.raises(ValueError, match="did you mean tsvd"):
        chosen(root, ["tsdv"])
    with pytest.raises(ValueError, match="holds no card"):
        chosen(tmp_path / "nowhere", [])
