"""Cards in a folder of their own, at a scale of seconds."""

import pytest
import yaml

from nativerank.reproduce.card import read_card, read_scales
from nativerank.reproduce.place import Place

CLAIM = {"says": "It is so", "source": "a paper"}


@pytest.fixture
def root(tmp_path, settings):
    """A folder reproductions with the scales, tiny ones, and no card."""
    folder = tmp_path / "project" / "reproductions"
    folder.mkdir(parents=True)
    tiny = {"train.checkpoint_every": 0, "optim.aux_lr": 0.01, **settings()}
    tiny.pop("train.steps", None)
    scale = {"what": "seconds", "settings": tiny, "horizons": [4, 8], "seeds": 3, "stages": "lr"}
    desk = {**scale, "needs": "cuda"}
    (folder / "scales.yaml").write_text(yaml.safe_dump({"scales": {"pocket": scale, "desk": desk}}))
    return folder


@pytest.fixture
def write_card(root):
    """write_card(name, claims, **experiments): a card, and what it reads as."""

    def make(name, claims, **experiments):
        config = {
            "title": "A title",
            "claims": {claim: CLAIM for claim in claims},
            "scales": {"pocket": experiments},
            "limits": "It is small.",
        }
        (root / name).mkdir()
        (root / name / "config.yaml").write_text(yaml.safe_dump(config))
        return read_card(root / name)

    return make


@pytest.fixture
def scale(root):
    return read_scales(root)["pocket"]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "grid", 1, None, lambda line: None)
