"""result.json of a card: by scale what its experiments gave, and the command, commit, code, configuration and machine.

A scale is written as soon as its experiments are done; the others stay as they were.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nativerank.experiments.request import put
from nativerank.reproduce.card import Card, Scale
from nativerank.reproduce.code_hash import code_hash

RESULT = "result.json"


@dataclass(frozen=True)
class Outcome:
    """What a card's experiments gave at one scale.

    Args:
        command: that made it. commit: of the program; commits: commit -> cells.
        config_hash: of the experiments and of what all cards share; code_hash: `reproduce.code_hash`.
        environment: versions, processor, card, threads.
        races, measures, sweeps: by name.
    """

    command: str
    commit: str
    config_hash: str
    code_hash: str
    environment: dict[str, Any]
    races: dict[str, Any]
    measures: dict[str, Any]
    sweeps: dict[str, Any]

    def stale(self, card: Card, name: str, scale: Scale) -> list[str]:
        """Why a rerun may give something else: other code, other experiments.

        Args:
            card, name, scale: whose outcome it is, at which scale.
        """
        code = ["the code has changed since"] if self.code_hash != code_hash(card.scales[name]) else []
        same = self.config_hash == config_hash(card, name, scale)
        return code + ([] if same else ["the experiments have changed since"])


def config_hash(card: Card, name: str, scale: Scale) -> str:
    """Twelve hex digits of what a card runs at a scale."""
    experiments = asdict(card.scales[name])
    del experiments["note"]
    shared = {key: value for key, value in asdict(scale).items() if key != "what"}
    return hashlib.sha256(json.dumps([experiments, shared], sort_keys=True).encode()).hexdigest()[:12]


def read(folder: Path) -> dict[str, Outcome]:
    """The outcomes of a card by scale; none where it has not run.

    Raises:
        ValueError: a damaged file.
    """
    file = folder / RESULT
    if not file.exists():
        return {}
    try:
        return {name: Outcome(**values) for name, values in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{file} cannot be read; run the card again, or take the file of the repository") from None


def write(folder: Path, name: str, outcome: Outcome) -> None:
    """Adds or replaces the outcome of one scale."""
    outcomes = {**read(folder), name: outcome}
    text = json.dumps({key: asdict(outcomes[key]) for key in sorted(outcomes)}, indent=1)
    put(folder / RESULT, compact(text) + "\n")


def compact(text: str) -> str:
    """Indented JSON with lists of numbers on one line."""
    import re

    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s*\n\s*", " ", m[1]) + "]", text)
