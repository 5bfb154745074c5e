"""The committed cards: rendered from their results, stale where they are, none without a judge, figure or claim."""

import re
from pathlib import Path

import pytest
from made import arm, outcome, race

from nativerank.cli.reproduce import listed
from nativerank.reproduce.card import CONFIG, card_names, read_card, read_scales
from nativerank.reproduce.cards import judge_of
from nativerank.reproduce.overview import BEGIN, END, overview, summary, write_into_readme
from nativerank.reproduce.pages import write_pages
from nativerank.reproduce.paper import paper_runs, read_paper
from nativerank.reproduce.render import CARD, FIGURE, render, table, verdicts
from nativerank.reproduce.store import read, write

PROJECT = Path(__file__).parents[2]
CARDS = PROJECT / "reproductions"
NAMES = card_names(CARDS)
AGAIN = "make cards"


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_card_is_what_its_result_renders_to(name):
    card, folder = read_card(CARDS / name), CARDS / name
    text = render(name, card, read_scales(CARDS), read(folder), folder)
    assert (folder / CARD).read_text(encoding="utf-8") == text, f"run {AGAIN} and commit"


def test_the_overview_and_the_readme_are_rendered_too():
    cards, scales = listed(CARDS), read_scales(CARDS)
    assert (CARDS / "README.md").read_text(encoding="utf-8") == overview(cards, scales), f"run {AGAIN} and commit"
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    between = readme.partition(BEGIN)[2].partition(END)[0]
    assert between.strip().splitlines() == summary(cards, scales, "reproductions/"), f"run {AGAIN} and commit"


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_a_judge_and_its_claims_are_the_judges(name):
    card, outcomes = read_card(CARDS / name), read(CARDS / name)
    assert callable(judge_of(name).judge)
    for found in verdicts(name, card, outcomes).values():  # raises where they differ
        assert found.keys() == card.claims.keys()
    if outcomes:
        assert (CARDS / name / FIGURE).exists()


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_the_papers_have_a_plan(name):
    assert read_paper(CARDS / name).keys() == paper_runs(CARDS / name).keys()


def test_the_paper_runs_of_sct_have_the_published_sizes():
    """The rank sweep of SCT (arXiv 2604.00733), to the parameter."""
    published = {"dense-adamw": 1_711_376_384, "sct-256": 692_178_944, "sct-128": 597_797_888}
    published |= {"sct-64": 550_607_360, "sct-32": 527_012_096}
    assert {run: plan["parameters"] for run, plan in read_paper(CARDS / "sct-ranks").items()} == published


@pytest.mark.parametrize("name", NAMES)
def test_a_result_holds_three_paired_seeds_at_every_point_it_reports(name):
    for found in read(CARDS / name).values():
        for what in found.races.values():
            for horizon in what["horizons"].values():
                for label, entry in horizon["arms"].items():
                    assert entry["seeds"] == [0, 1, 2] or entry["diverged"] or entry["refused"], label


@pytest.fixture
def filled(root, write_card):
    """A card with a result of arms a and b, and its project's README."""
    write_card("method-order", ["self-guided", "naive", "order", "downstream"], races={"M": {"arms": ["spectron"]}})
    losses = {
        "spectron": 2.9,
        "self-guided": 3.0,
        "lowrank-adamw": arm(3.02, edges=[{"coordinate": "optim.lr", "side": "upper"}]),
    }
    write(root / "method-order", "pocket", outcome({"M": race({150: losses, 450: losses})}))
    (root.parent / "README.md").write_text(f"# Project\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    return root


def test_pages_hold_verdicts_numbers_and_the_mark_of_staleness(filled):
    write_pages(listed(filled), read_scales(filled), filled)
    text = (filled / "method-order" / CARD).read_text()
    for part in ("**reproduced**", "**stale**", "M, 150 steps", "2.9003", "best lr at the upper edge", FIGURE, CONFIG):
        assert part in text, part
    assert (filled / "method-order" / FIGURE).read_text().startswith("<?xml")
    readme = (filled.parent / "README.md").read_text()
    assert "old" not in readme and readme.endswith("The end.\n") and "reproductions/method-order/card.md" in readme
    assert "(stale)" in readme and "not testable here" in readme


def test_rendering_twice_changes_nothing(filled):
    cards, scales = listed(filled), read_scales(filled)
    write_pages(cards, scales, filled)
    before = {file: file.read_bytes() for file in filled.parent.rglob("*") if file.is_file()}
    write_pages(cards, scales, filled)
    assert before == {file: file.read_bytes() for file in filled.parent.rglob("*") if file.is_file()}


def test_every_number_of_a_verdict_comes_from_the_result(filled):
    (listed_card,) = listed(filled)
    before = render("method-order", listed_card.card, read_scales(filled), listed_card.outcomes, filled)
    moved = {"spectron": 3.3, "self-guided": 3.0, "lowrank-adamw": 3.02}
    write(filled / "method-order", "pocket", outcome({"M": race({150: moved, 450: moved})}))
    (listed_card,) = listed(filled)
    after = render("method-order", listed_card.card, read_scales(filled), listed_card.outcomes, filled)
    assert "reproduced; M, 150 steps: -0.10" in before and "not reproduced; M, 150 steps: +0.30" in after


def test_a_readme_without_marks_is_left_alone(tmp_path):
    file = tmp_path / "README.md"
    write_into_readme(file, ["x"])
    assert not file.exists()
    file.write_text("nothing here")
    write_into_readme(file, ["x"])
    assert file.read_text() == "nothing here"


def test_a_card_that_has_not_run_says_so(root, write_card):
    card = write_card("tsvd", ["matches-dense", "less-compute", "orthonormality"])
    text = render("tsvd", card, read_scales(root), {}, root / "tsvd")
    assert "Not run yet." in text and text.count("not run") == 3


def test_a_card_with_other_claims_than_its_judge_is_an_error(root, write_card):
    card = write_card("method-order", ["something"])
    with pytest.raises(ValueError, match="judge knows"):
        verdicts("method-order", card, {"pocket": outcome({})})


def test_bars_in_a_cell_do_not_end_it():
    assert table(["a"], [["||dW||"]])[-1] == r"| \|\|dW\|\| |"


def test_links_of_the_overview_lead_somewhere():
    text = (CARDS / "README.md").read_text(encoding="utf-8")
    assert all((CARDS / link).exists() for link in re.findall(r"\]\(([\w./-]+)\)", text))
