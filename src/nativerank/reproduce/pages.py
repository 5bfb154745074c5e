"""Writes every card's page and figure, the page over all, and the table in the project's README."""

from collections.abc import Mapping
from pathlib import Path

from nativerank.experiments.request import put
from nativerank.reproduce.card import Scale
from nativerank.reproduce.cards import judge_of
from nativerank.reproduce.overview import README, Listed, overview, summary, write_into_readme
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.render import CARD, FIGURE, render


def write_pages(cards: list[Listed], scales: Mapping[str, Scale], root: Path) -> None:
    """From the results as they are.

    Args:
        root: folder of the cards; the README beside it gets the table.

    Raises:
        ImportError: no matplotlib.
    """
    for listed in cards:
        folder = root / listed.name
        if listed.outcomes:
            largest = [name for name in scales if name in listed.outcomes][-1]
            judge_of(listed.name).draw(Seen(listed.outcomes[largest]), folder / FIGURE)
        put(folder / CARD, render(listed.name, listed.card, scales, listed.outcomes, folder))
    put(root / README, overview(cards, scales))
    write_into_readme(root.parent / README, summary(cards, scales, f"{root.name}/"))
