"""Figures of a scaling fit, by matplotlib from its record alone (`scaling.fit`).

isoflop.svg    loss against model size, a parabola per budget, a panel per method and rank ratio
frontier.svg   best model size and tokens against compute with their bands, and slopes of the paper
losses.svg     losses as measured against those of the parametric law
rank.svg       best rank ratio against compute, where the law with rank was fitted
saving.svg     what low rank saves at inference, against compute (of `scaling.frontier`)
"""

import math
from pathlib import Path
from typing import Any

from nativerank.report.plots import canvas, legend, save, style

BUDGETS = ("#1f4e79", "#2a7f9e", "#4fae8f", "#a6b93c", "#d99a2b", "#c2512f", "#8a2f5b", "#5b3a8c")
PUBLISHED = {"low rank": (0.479, ":"), "dense": (0.49, "--")}  # exponents of N, Spectron paper


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the record holds; returns the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups = found["groups"]
    iso = {name: group for name, group in groups.items() if group["isoflop"]}
    laws = {name: group for name, group in groups.items() if group["parametric"]}
    made = []
    if iso:
        made += [draw_isoflop(iso, folder / "isoflop.svg"), draw_frontier(iso, folder / "frontier.svg")]
    if laws:
        made.append(draw_losses(laws, folder / "losses.svg"))
    if found["surface"]:
        made.append(draw_rank(found["surface"], folder / "rank.svg"))
    return made


def looks(groups: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour and label of each group; one method's ratios differ."""
    seen: dict[str, int] = {}
    found = {}
    for number, (name, group) in enumerate(groups.items()):
        again = seen.setdefault(group["method"], 0)
        seen[group["method"]] += 1
        look = style(group["method"] if again == 0 else name, number)
        found[name] = {"color": look["color"], "linestyle": look["linestyle"], "label": name}
    return found


def draw_isoflop(groups: dict[str, Any], file: Path) -> Path:
    """Runs as dots, parabolas as lines, minima as rings."""
    figure, panels = canvas(len(groups), 0.4 + (4.2 if len(groups) < 3 else 3.3) * len(groups), 4.0)
    budgets = sorted({row["flops"] for group in groups.values() for row in group["isoflop"]["profiles"]})
    for panel, (name, group) in zip(panels, groups.items(), strict=True):
        for row in group["isoflop"]["profiles"]:
            color = BUDGETS[budgets.index(row["flops"]) % len(BUDGETS)]
            runs = [run for run in group["curves"]["runs"] if run["budget"] == row["flops"]]
            label = f"{row['flops']:.3g} FLOPs"
            panel.plot([r["params"] for r in runs], [r["loss"] for r in runs], "o", color=color, ms=4, label=label)
            for curve in group["curves"]["isoflop"]["profiles"]:
                if curve["flops"] == row["flops"]:
                    panel.plot(curve["params"], curve["loss"], color=color, lw=1)
            if row["params"] is not None and not row["fault"]:
                panel.plot(row["params"], row["loss"], "o", color=color, ms=9, mfc="none")
        panel.set(xscale="log", xlabel="parameters N", title=name)
    panels[0].set_ylabel("loss (nats/token)")
    losses = [run["loss"] for group in groups.values() for run in group["curves"]["runs"]]
    margin = 0.05 * (max(losses) - min(losses))
    for panel in panels:  # one scale, by the runs: a parabola may rise far beyond them
        panel.set_ylim(min(losses) - margin, max(losses) + margin)
    legend(figure, panels[0])
    return save(figure, file)


def draw_frontier(groups: dict[str, Any], file: Path) -> Path:
    """N_opt and D_opt against C; what was measured as dots, the laws as lines with bands, up to a decade further."""
    figure, panels = canvas(2, 9.4, 4.0)
    for name, look in looks(groups).items():
        group = groups[name]
        used = [row for row in group["isoflop"]["profiles"] if row["params"] is not None and not row["fault"]]
        last = 10 * max(row["flops"] for row in used)
        for panel, key in zip(panels, ("params", "tokens"), strict=True):
            curve = group["curves"]["isoflop"][key]
            there = [i for i, flops in enumerate(curve["flops"]) if flops <= last]
            flops, best = ([curve[k][i] for i in there] for k in ("flops", "best"))
            panel.plot(flops, best, lw=1.3, **look)
            band = [curve["band"][i] for i in there]
            if all(band):
                low, high = zip(*band, strict=True)
                panel.fill_between(flops, low, high, color=look["color"], alpha=0.15, lw=0)
            panel.plot([row["flops"] for row in used], [row[key] for row in used], "o", color=look["color"], ms=5)
    firsts = [group["curves"]["isoflop"]["params"] for group in groups.values()]
    first = min(firsts, key=lambda curve: curve["best"][0])  # the slopes stand below all laws
    for label, (exponent, dash) in PUBLISHED.items():
        flops = [first["flops"][0], 10 * first["flops"][0]]
        scale = first["best"][0] / first["flops"][0] ** exponent
        line = {"color": "#999999", "linestyle": dash, "lw": 1, "label": f"paper's slope, {label}: {exponent:g}"}
        panels[0].plot(flops, [0.6 * scale * c**exponent for c in flops], **line)
    panels[0].set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="best parameters N")
    panels[1].set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="best tokens D")
    legend(figure, panels[0])
    return save(figure, file)


def draw_losses(groups: dict[str, Any], file: Path) -> Path:
    """How far each run lies from the parametric law of its group, against the loss."""
    figure, (panel,) = canvas(1, 6.4, 3.8)
    for name, look in looks(groups).items():
        law, runs = groups[name]["parametric"], groups[name]["curves"]["runs"]
        fitted = [predicted(law, run) for run in runs]
        errors = [100 * math.log(run["loss"] / loss) for run, loss in zip(runs, fitted, strict=True)]
        panel.plot(fitted, errors, "o", ms=4, color=look["color"], label=name)
    panel.axhline(0, color="black", lw=0.6)
    panel.set(xlabel="loss by E + A/N^alpha + B/D^beta (nats/token)", ylabel="measured above it (%)")
    legend(figure, panel)
    return save(figure, file)


def predicted(law: dict[str, Any], run: dict[str, Any]) -> float:
    """The loss that a law gives a run."""
    return float(law["E"] + law["A"] / run["params"] ** law["alpha"] + law["B"] / run["tokens"] ** law["beta"])


def draw_rank(surfaces: dict[str, Any], file: Path) -> Path:
    """The best rank ratio of every budget with its interval."""
    figure, (panel,) = canvas(1, 6.4, 3.8)
    for number, (method, surface) in enumerate(surfaces.items()):
        rows, look = surface["best"], style(method, number)
        flops, best = [row["flops"] for row in rows], [row["rank_ratio"] for row in rows]
        spans = [row["rank_interval"] or [row["rank_ratio"]] * 2 for row in rows]
        down = [max(0.0, b - low) for b, (low, _) in zip(best, spans, strict=True)]
        up = [max(0.0, high - b) for b, (_, high) in zip(best, spans, strict=True)]
        panel.errorbar(flops, best, yerr=[down, up], fmt="o-", color=look["color"], capsize=3, label=method)
    panel.set(xscale="log", xlabel="training FLOPs C", ylabel="best rank ratio")
    legend(figure, panel)
    return save(figure, file)


def draw_saving(record: dict[str, Any], file: Path) -> Path:
    """1 - N_lowrank / N_dense of the best models against C, with its interval; beyond the runs it is dashed."""
    figure, (panel,) = canvas(1, 7.0, 4.0)
    curve, last = record["saving"]["curve"], record["saving"]["last_budget"]
    rows = [(c, 100 * s, band) for c, s, band in zip(curve["flops"], curve["best"], curve["band"], strict=True)]
    here = sum(c <= last for c, _, _ in rows)
    for part, dash, label in ((rows[:here], "-", "this sweep"), (rows[max(0, here - 1) :], "--", "extrapolated")):
        panel.plot([c for c, _, _ in part], [s for _, s, _ in part], dash, color="#d1495b", lw=1.5, label=label)
    if all(band for _, _, band in rows):
        low, high = zip(*[[100 * x for x in band] for _, _, band in rows], strict=True)
        panel.fill_between([c for c, _, _ in rows], low, high, color="#d1495b", alpha=0.15, lw=0, label="interval")
    paper = record["saving"]["paper"]
    panel.plot(paper["flops"], [100 * s for s in paper["saving"]], ":", color="#666666", lw=1.2, label=paper["label"])
    panel.axhline(0, color="black", lw=0.6)
    lowest = min([s for _, s, _ in rows] + [100 * band[0] for _, _, band in rows if band])
    panel.set_ylim(max(-100.0, min(-5.0, 1.1 * lowest)), 100)  # a wild interval must not flatten the curve
    panel.set(xscale="log", xlabel="training FLOPs C", ylabel="fewer parameters at inference (%)")
    legend(figure, panel)
    return save(figure, file)
