"""The page over all cards, and the table of it that stands in the project's README."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nativerank.experiments.request import put
from nativerank.reproduce.card import Card, Scale
from nativerank.reproduce.render import STALE, table, verdicts, word
from nativerank.reproduce.store import Outcome

README = "README.md"
BEGIN, END = "<!-- reproductions: made by `make cards` -->", "<!-- end of reproductions -->"


@dataclass(frozen=True)
class Listed:
    """A card with its outcomes by scale."""

    name: str
    card: Card
    outcomes: Mapping[str, Outcome]

    def stale(self, scales: Mapping[str, Scale]) -> list[str]:
        """The scales whose outcome is stale."""
        return [s for s, found in self.outcomes.items() if found.stale(self.card, s, scales[s])]


def overview(cards: list[Listed], scales: Mapping[str, Scale]) -> str:
    """reproductions/README.md."""
    parts = [
        "# Reproduction cards",
        "",
        "Every published claim about the three methods that can be asked of a small model, run side by side: each arm "
        "with its own search of matrix rate, auxiliary rate and init scale at every horizon, the same data order and "
        "initial matrices, three paired seeds. Verdicts and numbers are rendered from the results by functions "
        "(`nativerank.reproduce`) that have tests; nobody writes them.",
        "",
        *summary(cards, scales, ""),
        "",
        "Reproduced: resolved (95% interval of the paired difference leaves out zero) at every horizon, of the claimed "
        "size where one is claimed. In direction: resolved somewhere, nowhere against, but not everywhere or smaller. "
        "Not reproduced: not resolved, or against the claim. A verdict says nothing of another scale.",
        "",
        "## Scales",
        "",
        *[f"- **{name}**: {scale.what}." for name, scale in scales.items()],
        "- **paper**: the publications' own configurations with their planned cost; not run.",
        "",
        "    make reproduce                            # all cards at pocket scale",
        "    make reproduce CARD=sct-ranks             # one of them",
        "    nativerank reproduce --scale desk --minutes 9      # on a GPU, in slices that go on",
        "    make cards                                # pages and figures again, from the results as they are",
        "",
        "Runs are kept in `runs/reproductions` by a hash of the code that decides their result, so no run of another "
        f"program is taken for one of this. A card whose result was made by other code is marked {STALE}.",
        "",
        "## More text",
        "",
        "The desk scale wants 100M tokens; text of your own is best. Without any, Debian's packages have some: a "
        "dictionary (GPL), the kernel's manual (GPL-2) and Python's (PSF) are 78 MB or 21M tokens, and more can be "
        "named; the licence of each is put beside its text. Runs longer than the text pass over it again.",
        "",
        "    python reproductions/more_text.py --out texts",
        "    nativerank data prepare texts --out data/desk --tokenizer train:32000",
        "",
    ]
    return "\n".join(parts)


def summary(cards: list[Listed], scales: Mapping[str, Scale], prefix: str) -> list[str]:
    """A row per claim, a column per scale at which any card has run."""
    ran = [name for name in scales if any(name in listed.outcomes for listed in cards)]
    rows = []
    for listed in cards:
        found = verdicts(listed.name, listed.card, listed.outcomes)
        mark = f" ({STALE})" if listed.stale(scales) else ""
        for claim, said in listed.card.claims.items():
            words = [word(found, scale, claim) if scale in listed.card.scales else "-" for scale in ran]
            rows.append([said.says, f"[{listed.name}]({prefix}{listed.name}/card.md){mark}", *words])
    return table(["claim", "card", *ran], rows)


def counted(cards: list[Listed], scale: str) -> str:
    """How many claims got which verdict, in words."""
    every = [
        v.word for listed in cards for v in verdicts(listed.name, listed.card, listed.outcomes).get(scale, {}).values()
    ]
    return ", ".join(f"{number} {word}" for word, number in Counter(every).most_common())


def write_into_readme(file: Path, lines: list[str]) -> None:
    """Replaces what stands between the marks; a file without them is left alone.

    Args:
        file: of the project.
        lines: Markdown.
    """
    if not file.exists():
        return
    text = file.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        return
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    put(file, "\n".join([before + BEGIN, "", *lines, "", END]) + after)
