"""figure.svg of a card: the losses of its arms, or what its judge draws instead."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nativerank.report.plots import canvas, legend, save, style
from nativerank.reproduce.reading import Seen

Panel = Any
HEIGHT, ROW = 1.6, 0.26  # of a figure without rows, and of a row, in inches
SHADES = ("#c2d3da", "#7fb3d5", "#4f9bc7", "#0b2545")  # of horizons, the last one darkest
DASHES = {1.0: "-", 8.0: ":"}  # multiple of the searched rate


def draw_losses(seen: Seen, file: Path) -> Path:
    """A panel per race: mean loss of every arm with its range over seeds, a shade per horizon."""
    races = [race for race in seen.outcome.races if seen.horizons(race)]
    most = max(len(seen.arms(race, seen.horizons(race)[0])) for race in races)
    figure, panels = canvas(len(races), 1.6 + 3.6 * len(races), HEIGHT + ROW * most)
    for panel, race in zip(panels, races, strict=True):
        plot_losses(panel, seen, race)
        panel.set_title(race, loc="left", fontsize=9)
    legend(figure, panels[0])
    return save(figure, file)


def plot_losses(panel: Panel, seen: Seen, race: str) -> None:
    """Arms of a race from top to bottom."""
    horizons = seen.horizons(race)
    labels = list(seen.arms(race, horizons[-1]))
    for number, steps in enumerate(horizons):
        color = SHADES[max(0, len(SHADES) - len(horizons) + number)]
        known = [(row, list(seen.losses(race, steps, arm).values())) for row, arm in enumerate(labels)]
        known = [(row, losses) for row, losses in known if losses]
        rows, means = [row for row, _ in known], [statistics.fmean(losses) for _, losses in known]
        reach = [
            [m - min(v) for m, (_, v) in zip(means, known, strict=True)],
            [max(v) - m for m, (_, v) in zip(means, known, strict=True)],
        ]
        panel.errorbar(means, rows, xerr=reach, fmt="o", ms=4, color=color, label=f"{steps:,} steps")
    panel.set_yticks(range(len(labels)), [short(label) for label in labels])
    panel.set(xlabel="validation loss (nats/token), range over seeds")
    panel.invert_yaxis()


def short(label: str, width: int = 30) -> str:
    """An arm for an axis: keys without their group, folded."""
    name = label.replace("optim.", "").replace("rank.", "").replace("adapt.", "")
    return name if len(name) <= width else name.replace("[", "\n[", 1)


def draw_norms(seen: Seen, race: str, keys: Mapping[str, str], file: Path) -> Path:
    """A panel per probed norm at the last horizon: along the steps, a colour per arm, a dash per multiple."""
    steps = seen.horizons(race)[-1]
    arms = [arm for arm in seen.arms(race, steps) if seen.norms(race, steps, arm)]
    figure, panels = canvas(len(keys), 4.0 * len(keys), 4.4)
    for number, arm in enumerate(arms):
        look = style(arm, number)
        for multiple, dash in DASHES.items():
            entry = seen.norms(race, steps, arm, multiple)
            for panel, key in zip(panels, keys, strict=True):
                if entry and entry["course"]["steps"]:
                    label = f"{short(arm)}, {multiple:g}x"
                    panel.plot(
                        entry["course"]["steps"], entry["course"][key], dash, color=look["color"], lw=1, label=label
                    )
    for panel, title in zip(panels, keys.values(), strict=True):
        panel.set(yscale="log", xlabel="step", title=title)
    legend(figure, panels[0])
    return save(figure, file)


def draw_bars(values: Mapping[str, float], unit: str, file: Path, mark: tuple[float, str] | None = None) -> Path:
    """A bar per value, the value at its end; `mark`: a published value and its name."""
    figure, (panel,) = canvas(1, 7.2, HEIGHT + ROW * len(values))
    labels, numbers = list(values), list(values.values())
    panel.barh(range(len(labels)), numbers, color=SHADES[1], height=0.6)
    for row, number in enumerate(numbers):
        panel.annotate(
            f"{number:.3g}", (number, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    if mark:
        panel.axvline(mark[0], color="#d1495b", linestyle="--", label=mark[1])
        legend(figure, panel)
    panel.set_yticks(range(len(labels)), labels)
    panel.set(xlabel=unit)
    panel.margins(x=0.12)
    panel.invert_yaxis()
    return save(figure, file)
