"""The model card says what the model is, survives hostile names, and a run writes what it knows."""

import json
import math

import pytest
import torch
import yaml

import nativerank as nr
from nativerank.hub.card import PAPERS, Training, model_card, read_training
from nativerank.layers.pretrained import factored_config
from nativerank.methods import METHODS


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.fixture
def network():
    model = Network()
    nr.factorize(model, "sct", rank=4, overrides={"second": 6})
    return model


def front_of(text):
    _, front, rest = text.split("---\n", 2)
    return yaml.safe_load(front), rest


def test_it_counts_parameters_and_ranks(network):
    front, text = front_of(model_card(network, factored_config(network)))
    assert front == {"library_name": "nativerank", "tags": ["nativerank", "low-rank"]}
    total = sum(p.numel() for p in network.parameters())
    assert f"{total:,} parameters" in text and "would have 3,072 as dense ones" in text
    assert "| first | 48 x 32 | U diag(s) V^T | 4 | 1 |" in text and "| second | 32 x 48 |" in text
    assert 'nr.load("FOLDER", into=module)' in text and "from transformers" not in text


def test_names_from_outside_stay_in_their_cells(network):
    hostile = "a|b\n---\nlicense: mit\n<script>`{{x}}"
    training = Training("spectron", (hostile,), "ab" * 32, 10**9, 5, {"validation loss": 3.25, hostile: 1.0})
    front, text = front_of(model_card(network, factored_config(network), training))
    assert "license" not in front and "<script>" not in text and "\n---\n" not in text
    spy = "![x](http://h/x.png) [y](http://h) \\| z"
    _, text_of_spy = front_of(model_card(network, factored_config(network), Training(spy, (spy,), metrics={spy: 1.0})))
    assert r"| data | \!\[x\](http://h/x.png) \[y\](http://h) \\\| z |" in text_of_spy
    assert "![" not in text_of_spy
    assert "1,000,000,000" in text and "| validation loss | 3.2500 |" in text and "2602.12429" in text


def test_every_method_of_a_paper_is_cited(network):
    ours_or_plain = {"lowrank-adamw", "lowrank-muon", "adam-muon", "dense-adamw", "dense-muon"}
    assert set(METHODS) - ours_or_plain == set(PAPERS)
    for method, paper in PAPERS.items():
        text = model_card(network, factored_config(network), Training(method))
        assert f"eprint = {{{paper.arxiv}}}" in text and text.count("{") == text.count("}")
    assert "reconstruction" in model_card(network, factored_config(network), Training("tsvd"))


def test_a_run_writes_what_it_knows(run_config, listen, tmp_path, prepared):
    from nativerank.train.loop import train

    summary = train(run_config(out=tmp_path / "a", train__steps=2), listen())
    known = read_training(tmp_path / "a/model")
    assert known.method == "spectron" and known.steps == 2 and known.tokens == summary["tokens"]
    assert known.data == ("book.txt",) and len(known.data_sha256) == 64
    assert known.metrics["validation loss (nats per token)"] == summary["val_loss"]
    assert math.isclose(known.metrics["perplexity"], math.exp(summary["val_loss"]))
    text = (tmp_path / "a/model/README.md").read_text()
    assert f"| perplexity | {summary['perplexity']:.4f} |" in text and str(tmp_path) not in text
    nr.save(nr.load(tmp_path / "a"), tmp_path / "again", training=known)
    assert read_training(tmp_path / "again") == known


def test_a_folder_that_says_nothing_of_its_training(network, tmp_path):
    nr.save(network, tmp_path / "m")
    assert read_training(tmp_path / "m") is None
    (tmp_path / "m/config.json").write_text('{"nativerank": {"training": 5}}')
    with pytest.raises(ValueError, match=r"cannot read what .* says of its training"):
        read_training(tmp_path / "m")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", ["x"]),
        ("metrics", [1]),
        ("metrics", {"a": "b"}),
        ("metrics", {"a": True}),
        ("tokens", "many"),
        ("tokens", -1),
        ("steps", 1.5),
        ("data", "abc"),
        ("data", [["a"]]),
        ("data_sha256", 5),
    ],
)
def test_values_of_another_type_are_named(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({"nativerank": {"training": {key: value}}}))
    with pytest.raises(ValueError, match=rf"cannot read what .*config\.json says of .* nativerank\.training\.{key} is"):
        read_training(tmp_path)
