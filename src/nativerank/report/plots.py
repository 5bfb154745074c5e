"""Figures of a comparison, by matplotlib from its record alone (`compare.json`, or a sweep of benchmarks/results).

curves.svg   loss against tokens and against training FLOPs, every arm at its best
rates.svg    validation loss against the matrix rate, one line per arm, where several rates ran
norms.svg    ||dW||, change of the layer's output and ||W|| along training, where a study recorded them
robustness.svg   loss increase against the multiple of the best rate, and the best rate against the width
ablation.svg     loss against the rank, one line per variant
"""

from pathlib import Path
from typing import Any

KEY = "optim.lr"
LABELS = {"update_norm": "||dW||", "output_change": "RMS change of the layer's output", "sigma_W": "||W||"}
STYLES = {  # of the plain methods; other arms take the next colour
    "spectron": ("#d1495b", "-", "o"),
    "lowrank-muon": ("#edae49", "-", "s"),
    "lowrank-adamw": ("#00798c", "-", "^"),
    "self-guided": ("#7768ae", "-", "D"),
    "dense-muon": ("#8d8d8d", "--", "s"),
    "dense-adamw": ("#3b3b3b", "--", "^"),
}
OTHERS = ("#66a182", "#2e4057", "#b5651d", "#5b8e7d", "#5e548e", "#4f6d7a", "#8f6593", "#b5a642", "#6c464f", "#1b998b")
DASHES = ("-", "--", ":", "-.")
HINT = "figures need matplotlib: pip install 'nativerank[report]'"


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the record holds; returns the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    made = []
    if record["curves"]:
        made.append(draw_curves(record, folder / "curves.svg"))
    lines = rate_lines(record)
    if any(len(points) > 1 for points in lines.values()):
        made.append(draw_rates(lines, folder / "rates.svg", record["title"]))
    series = record.get("study", {}).get("series")
    if series:
        made.append(draw_norms(series, folder / "norms.svg"))
    numbers = record.get("study", {}).get("numbers", {})
    if "loss_increase" in numbers:
        made.append(draw_robustness(numbers, folder / "robustness.svg"))
    if record.get("study", {}).get("name") == "ablation":
        made.append(draw_ablation(numbers, folder / "ablation.svg"))
    return made


def style(label: str, number: int) -> dict[str, Any]:
    """Colour, dash and marker of an arm."""
    color, dash, marker = STYLES.get(label, (OTHERS[number % len(OTHERS)], "-", "v"))
    return {"color": color, "linestyle": dash, "marker": marker, "markersize": 4, "label": label}


def canvas(columns: int, width: float, height: float = 3.8) -> tuple[Any, list[Any]]:
    """A figure with axes side by side; without a display, and the same bytes from the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "nativerank", "font.size": 9})
    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for panel in axes[0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, list(axes[0])


def legend(figure: Any, panel: Any) -> None:
    """Below the panels, in as many columns as fit."""
    handles, labels = panel.get_legend_handles_labels()
    columns = max(1, int(figure.get_figwidth() * 12 / (max(map(len, labels), default=0) + 8)))
    figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8, ncols=columns)


def save(figure: Any, file: Path) -> Path:
    """Writes an SVG without a date."""
    from matplotlib import pyplot

    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return file


def draw_curves(record: dict[str, Any], file: Path) -> Path:
    """Training loss as a line, validations as dots; against tokens and against FLOPs."""
    figure, panels = canvas(2, 10.5)
    for number, (label, curve) in enumerate(record["curves"].items()):
        look = style(label, number)
        marker = look.pop("marker")
        for panel, unit in zip(panels, (1.0, curve["flops_per_token"]), strict=True):
            tokens, losses = [unit * t for t, _ in curve["train"]], [loss for _, loss in curve["train"]]
            panel.plot(tokens, losses, linewidth=1, **look)
            tokens, losses = [unit * t for t, _ in curve["validation"]], [loss for _, loss in curve["validation"]]
            dots = {"color": look["color"], "markersize": look["markersize"], "linestyle": "", "marker": marker}
            panel.plot(tokens, losses, **dots)
    panels[0].set(xlabel="tokens", ylabel="loss (nats/token): line training, dots validation")
    panels[1].set(xlabel="training FLOPs")
    legend(figure, panels[0])
    return save(figure, file)


def rate_lines(record: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """(rate, loss) points of each arm with its first seed, other coordinates at their best."""
    found: dict[str, list[tuple[float, float]]] = {}
    for label, best in record["best"].items():
        others = {key: value for key, value in best.items() if key != KEY}
        cells = [
            cell for cell in record["cells"] if cell["method"] == label and cell["seed"] == 0 and "val_loss" in cell
        ]
        found[label] = sorted((c[KEY], c["val_loss"]) for c in cells if all(c[k] == v for k, v in others.items()))
    return found


def draw_rates(lines: dict[str, list[tuple[float, float]]], file: Path, title: str) -> Path:
    """Validation loss against the matrix rate."""
    figure, (panel,) = canvas(1, 7.2)
    for number, (label, points) in enumerate(lines.items()):
        if points:
            panel.plot(*zip(*points, strict=True), **style(label, number))
    panel.set(xscale="log", xlabel="matrix learning rate", ylabel="validation loss (nats/token)")
    legend(figure, panel)
    panel.set_title(title, loc="left", fontsize=9)
    return save(figure, file)


def draw_norms(series: dict[str, dict[str, list[float]]], file: Path) -> Path:
    """Three panels along the steps, logarithmic; a colour per arm, a dash per multiple of its rate ("ARM at 5x")."""
    figure, panels = canvas(len(LABELS), 12.0, 4.4)
    names = {label: label.partition(" at ")[::2] for label in series}
    arms = list(dict.fromkeys(arm for arm, _ in names.values()))
    multiples = list(dict.fromkeys(multiple for _, multiple in names.values()))
    for label, values in series.items():
        arm, multiple = names[label]
        color, dash = style(arm, arms.index(arm))["color"], DASHES[multiples.index(multiple) % len(DASHES)]
        for panel, key in zip(panels, LABELS, strict=True):
            panel.plot(values["steps"], values[key], linewidth=1, label=label, color=color, linestyle=dash)
    for panel, name in zip(panels, LABELS.values(), strict=True):
        panel.set(yscale="log", xlabel="step", title=name)
    legend(figure, panels[0])
    return save(figure, file)


def draw_robustness(numbers: dict[str, Any], file: Path) -> Path:
    """Loss increases above each arm's best rate, and that rate at each width.

    Args:
        numbers: `loss_increase` and `without_loss` of findings, and `best_rate_by_width` where widths were compared.
        file: to write.
    """
    widths = {method: rates for method, rates in numbers.get("best_rate_by_width", {}).items() if rates}
    figure, panels = canvas(2 if widths else 1, 10.5 if widths else 7.2)
    plot_increases(panels[0], numbers["loss_increase"], numbers["without_loss"])
    if widths:
        plot_rates_by_width(panels[1], widths)
    legend(figure, panels[0])
    return save(figure, file)


def plot_increases(
    panel: Any, increases: dict[str, dict[str, float | None]], without: dict[str, dict[str, str]]
) -> None:
    """A line per arm through 0 at its best rate; a cross at the top where a run diverged."""
    for number, (label, by_multiple) in enumerate(increases.items()):
        look = style(label, number)
        rises = {float(m.removesuffix("x")): rise for m, rise in by_multiple.items() if rise is not None}
        # Without a loss anywhere there is no best rate either, whose increase is none.
        points = sorted({**rises, 1.0: 0.0}.items()) if rises else []
        panel.plot([m for m, _ in points], [rise for _, rise in points], **look)
        shift = 1 + 0.02 * number  # several arms may diverge at one multiple
        lost = [float(m.removesuffix("x")) for m, why in without.get(label, {}).items() if why.startswith("diverged")]
        cross = {**look, "marker": "x", "markersize": 6, "linestyle": "", "label": "_"}
        heights = [0.97] * len(lost)
        panel.plot([shift * m for m in lost], heights, transform=panel.get_xaxis_transform(), **cross)
    panel.axhline(0, color="black", linewidth=0.6)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda multiple, _: f"{multiple:g}x")
    panel.set(xlabel="multiple of the best matrix rate (x at the top: diverged)", ylabel="loss increase (nats/token)")


def plot_rates_by_width(panel: Any, rates: dict[str, dict[str, float]]) -> None:
    """The best matrix rate of each method against d_model."""
    for number, (method, by_width) in enumerate(rates.items()):
        points = sorted((int(width), rate) for width, rate in by_width.items())
        panel.plot([width for width, _ in points], [rate for _, rate in points], **style(method, number))
    widths = sorted({int(width) for by_width in rates.values() for width in by_width})
    panel.set(xscale="log", yscale="log", xlabel="d_model", ylabel="best matrix rate")
    panel.set_xticks(widths, list(map(str, widths)))
    panel.set_xticks([], minor=True)


def draw_ablation(numbers: dict[str, dict[str, float | None]], file: Path) -> Path:
    """Mean validation loss against the rank; `numbers`: rank -> variant -> loss, None where a run diverged."""
    figure, (panel,) = canvas(1, 7.2)
    ranks = sorted(numbers, key=int)
    for number, variant in enumerate(dict.fromkeys(name for losses in numbers.values() for name in losses)):
        points = [(int(rank), loss) for rank in ranks if (loss := numbers[rank].get(variant)) is not None]
        method = variant.rpartition("(")[2].removesuffix(")")  # "both (spectron)" has the colour of spectron
        look = {**style(method, number), "label": variant}
        panel.plot([rank for rank, _ in points], [loss for _, loss in points], **look)
    panel.set(xlabel="rank", ylabel="validation loss (nats/token)")
    panel.set_xticks([int(rank) for rank in ranks])
    legend(figure, panel)
    return save(figure, file)
