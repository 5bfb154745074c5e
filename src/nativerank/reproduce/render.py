"""card.md: claims, verdicts and every number, from the card's configuration and its result alone."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nativerank.experiments.arms import COORDINATES
from nativerank.reproduce.card import CONFIG, Card, Claim, Scale
from nativerank.reproduce.cards import judge_of
from nativerank.reproduce.paper import read_paper
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.store import RESULT, Outcome
from nativerank.reproduce.verdict import Verdict

FIGURE, CARD = "figure.svg", "card.md"
STALE = "stale"
Verdicts = Mapping[str, Mapping[str, Verdict]]  # scale -> claim -> verdict


def verdicts(name: str, card: Card, outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Verdict]]:
    """What every claim comes to, by scale.

    Raises:
        ValueError: the judge's claims are not the card's.
    """
    found = {}
    for scale, outcome in outcomes.items():
        found[scale] = judge_of(name).judge(Seen(outcome))
        if found[scale].keys() != card.claims.keys():
            raise ValueError(f"{name}: the judge knows {sorted(found[scale])}, the card {sorted(card.claims)}")
    return found


def render(name: str, card: Card, scales: Mapping[str, Scale], outcomes: Mapping[str, Outcome], folder: Path) -> str:
    """The whole card."""
    found = verdicts(name, card, outcomes)
    lines = [f"# {card.title}", "", *claims_table(card, found), ""]
    for claim, said in card.claims.items():
        lines += [*because(said, {scale: found[scale][claim] for scale in found}), ""]
    if outcomes and (folder / FIGURE).exists():
        lines += [f"![{card.title}]({FIGURE})", ""]
    for scale, experiments in card.scales.items():
        lines += [f"## {scale.capitalize()}", ""]
        lines += [f"{upper(scales[scale].what)}.", ""] if experiments.races else []
        lines += [f"{upper(experiments.note)}.", ""] if experiments.note else []
        if scale in outcomes:
            lines += scale_lines(name, card, scale, scales[scale], outcomes[scale])
        else:
            lines += ["Not run yet.", ""]
    lines += paper_lines(card, folder)
    lines += ["## Limits", "", card.limits, ""] if card.limits else []
    commands = " ".join(f"`make reproduce CARD={name}{'' if s == 'pocket' else f' SCALE={s}'}`" for s in card.scales)
    lines += [f"To run it again: {commands}. Experiments: [{CONFIG}]({CONFIG}); numbers: [{RESULT}]({RESULT})."]
    return "\n".join(lines) + "\n"


def upper(text: str) -> str:
    """A sentence from its first letter on; the rest as it is."""
    return text[:1].upper() + text[1:]


def claims_table(card: Card, found: Verdicts) -> list[str]:
    """Claim, what was published, a verdict per scale."""
    scales = list(card.scales)
    head = ["claim", "published", *scales]
    rows = [
        [f"{said.says} ({said.source})", said.published or "-", *(word(found, scale, claim) for scale in scales)]
        for claim, said in card.claims.items()
    ]
    return table(head, rows)


def word(found: Verdicts, scale: str, claim: str) -> str:
    """The verdict at a scale."""
    return f"**{found[scale][claim].word}**" if scale in found else "not run"


def because(said: Claim, by_scale: Mapping[str, Verdict]) -> list[str]:
    """Why, per scale."""
    return [f"**{said.says}.**"] + [f"{scale}: {verdict.word}; {verdict.why}." for scale, verdict in by_scale.items()]


def scale_lines(name: str, card: Card, scale: str, shared: Scale, outcome: Outcome) -> list[str]:
    """Whether it is stale, tables, what else is told, and where it ran."""
    stale = outcome.stale(card, scale, shared)
    lines = [f"**{STALE}**: {'; '.join(stale)}.", ""] if stale else []
    seen = Seen(outcome)
    for race in outcome.races:
        for steps in seen.horizons(race):
            lines += [f"{race}, {steps:,} steps{budget(outcome, race)}:", "", *arms_table(seen.arms(race, steps)), ""]
    told = judge_of(name).tell(seen)
    lines += [*told, ""] if told else []
    for key, text in card.scales[scale].measures.items():
        lines += [f"- `{key}`: `nativerank {text}`"]
    lines += [""] if card.scales[scale].measures else []
    return [*lines, ran(outcome), ""]


def budget(outcome: Outcome, race: str) -> str:
    """What the arms have in common, if not their tokens."""
    return "" if outcome.races[race]["budget"] == "tokens" else ", equal training FLOPs"


def ran(outcome: Outcome) -> str:
    """Command, program and machine."""
    about = outcome.environment
    gpu = f", {about['gpu']}" if "gpu" in about else ""
    return (
        f"Made by `{outcome.command}`, commit {outcome.commit[:12]}, code {outcome.code_hash}, experiments "
        f"{outcome.config_hash}, torch {about['torch']}, {about['processor']}{gpu}."
    )


def arms_table(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every arm at its best, lowest mean first."""
    head = ["arm", "lr", "aux lr", "init scale", "steps", "parameters", "FLOPs", "loss by seed", "mean", "sd", "notes"]
    order = sorted(arms.items(), key=lambda item: statistics.fmean(item[1]["val_losses"] or [math.inf]))
    return table(head, [arm_row(label, arm) for label, arm in order])


def arm_row(label: str, arm: Mapping[str, Any]) -> list[str]:
    """One arm."""
    losses, best = arm["val_losses"], arm["best"] or {}
    rates = [f"{best[key]:.3g}" if key in best else "-" for key in COORDINATES]
    mean = f"{statistics.fmean(losses):.4f}" if losses else "-"
    spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
    counts = [f"{arm['steps']:,}", f"{arm['parameters']['total']:,}", f"{arm['flops']:.2e}"]
    return [f"`{label}`", *rates, *counts, ", ".join(f"{v:.4f}" for v in losses), mean, spread, notes(arm)]


def notes(arm: Mapping[str, Any]) -> str:
    """What a reader of a mean should know."""
    words = [f"best {edge['coordinate'].partition('.')[2]} at the {edge['side']} edge" for edge in arm["edges"]]
    words += [f"{arm[key]} of {len(arm['tried'])} runs {key}" for key in ("diverged", "failed", "refused") if arm[key]]
    words += [f"{n} steps refused by the guard" for n in [arm["refused_steps_at_best"]] if n]
    return "; ".join(words)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown; a bar inside a cell would end it."""
    every = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in every]


def paper_lines(card: Card, folder: Path) -> list[str]:
    """The publication's own runs: configurations and what they would cost."""
    if card.paper is None:
        return []
    planned = read_paper(folder)
    head = ["run", "parameters", "steps", "tokens", "training FLOPs", f"hours on {card.paper.device}, at best"]
    rows = [
        [
            f"[{name}](paper/{name}.yaml)",
            f"{plan['parameters'] / 1e6:.0f}M",
            f"{plan['steps']:,}",
            f"{plan['tokens'] / 1e6:,.0f}M",
            f"{plan['flops']:.3g}",
            f"{plan['hours']:.2f}",
        ]
        for name, plan in planned.items()
    ]
    command = "sbatch launch/slurm.sbatch --config FILE --data.path DATA --out runs/NAME"
    lines = ["## Paper", "", f"Not run. {upper(card.paper.note)}.", ""]
    return [*lines, *table(head, rows), "", f"Planned by `nativerank plan`; to run one: `{command}`.", ""]
