"""The publication's own runs of a card: configuration files beside it, and what `nativerank plan` says they cost.

reproductions/NAME/paper/RUN.yaml   for `nativerank train --config`
                        /plan.json  by run: parameters, steps, tokens, training FLOPs, hours
"""

import json
from pathlib import Path
from typing import Any

from nativerank.experiments.request import put
from nativerank.reproduce.card import PAPER, Card
from nativerank.reproduce.place import command

PLAN = "plan.json"


def paper_runs(folder: Path) -> dict[str, Path]:
    """The configurations of a card by name."""
    return {file.stem: file for file in sorted((folder / PAPER).glob("*.yaml"))}


def plan_paper(card: Card, folder: Path) -> dict[str, Any]:
    """Plans every run and writes plan.json; the plans by run.

    Raises:
        ValueError: a configuration that training would refuse.
    """
    assert card.paper is not None
    found = {name: planned(file, card.paper.device) for name, file in paper_runs(folder).items()}
    put(folder / PAPER / PLAN, json.dumps(found, indent=1) + "\n")
    return found


def planned(file: Path, device: str) -> dict[str, Any]:
    """What a run would cost; time is a bound by the device's peaks."""
    plan = json.loads(command(["plan", "--config", str(file), "--on", device, "--json"]))
    return {
        "parameters": plan["params"]["total"],
        "steps": plan["settings"]["steps"],
        "tokens": plan["settings"]["tokens"],
        "flops": plan["flops"]["run"]["exact"],
        "hours": plan["time"]["hours"],
    }


def read_paper(folder: Path) -> dict[str, Any]:
    """plan.json; nothing where it was not made."""
    file = folder / PAPER / PLAN
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found
