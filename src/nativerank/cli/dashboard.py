"""A run on one screen: what it is, how far it is, its curves as sparklines, norms against their bound, last events."""

import math
from datetime import timedelta
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nativerank.report.run_charts import described
from nativerank.report.runs import number
from nativerank.report.thin import medians
from nativerank.report.watch import Series, Watched

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
ASCII = "_.-~=+*#"  # where a terminal has no blocks
SPARK = 60  # at most, of the columns
ROOMY = 72  # columns from which norms of the factors are shown too
NARROW = 45  # columns that everything beside a sparkline takes
SHOWN_EVENTS, SHOWN_MATRICES, SHOWN_CHECKPOINTS = 5, 6, 4
COLORS = {"running": "green", "finished": "green", "silent": "yellow", "interrupted": "yellow", "diverged": "red"}


class Dashboard:
    """The picture of a run as it stands when it is drawn."""

    def __init__(self, watched: Watched):
        self.watched = watched

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        w = self.watched
        parts: list[Any] = [*header(w, console.width), Text()]
        if w.state == "waiting":
            parts.append(Text("nothing is written yet: the run reads its data or builds its model"))
        else:
            ramp = ASCII if options.ascii_only else BLOCKS
            parts += [curves(w, ramp, max(min(console.width - NARROW, SPARK), 8))]
            parts += [Text(), norms(w, console.width)] if w.probes else []
            parts += [Text(), *happened(w)]
        yield Group(*parts)


def header(w: Watched, width: int) -> list[Any]:
    """What it is, and how far."""
    facts, state = w.facts, w.state
    said = f"no row for {span(w.silent_seconds())}" if state == "silent" else state
    first = Table.grid(expand=True, padding=(0, 1))
    first.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    first.add_column(no_wrap=True, justify="right")
    first.add_row(Text(plain(w.folder), style="bold"), Text(said, style=COLORS.get(state, "")))
    if not facts:
        return [first]
    what = [plain(facts.get(key)) for key in ("model", "method", "device") if facts.get(key)]
    n = facts.get("parameters")
    if isinstance(n, dict):
        total, rest = number(n.get("total")) / 1e6, number(n.get("non_embedding")) / 1e6
        what.append(f"{total:,.2f}M parameters ({rest:,.2f}M without embeddings)")
    line = Text(", ".join(what), no_wrap=True, overflow="ellipsis")
    return [first, line, way(w, width)]


def way(w: Watched, width: int) -> Table:
    """The bar, and the time that is left."""
    done, left = f"step {w.step:,}", w.seconds_left
    if w.steps:
        done += f" of {w.steps:,}"
    text = f"{w.step / w.steps:.0%}" if w.steps else ""
    if w.state in ("running", "silent") and math.isfinite(left):
        text += f"  about {span(left)} left"
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    bar = ProgressBar(total=w.steps, completed=min(w.step, w.steps), width=max(width - 50, 10)) if w.steps else ""
    table.add_row(done, bar, text)
    return table


def curves(w: Watched, ramp: str, width: int) -> Table:
    """A line per number that the run has: its last value, its way there, the range of that."""
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right"):
        table.add_column(no_wrap=True, justify=justify)
    table.add_column(no_wrap=True, width=width)
    table.add_column()  # of all columns this one gives way
    lines = [
        ("loss", w.series["loss"], "{:.4f}"),
        ("val loss", w.series["val_loss"], "{:.4f}"),
        ("tokens/s", w.series["tokens_per_second"], "{:,.0f}"),
        ("lr", w.series["lr"], "{:.3g}"),
        ("grad norm", w.series["grad_norm"], "{:.3g}"),
        ("||dW|| / lr", w.ratios, "{:.3f}"),
    ]
    for name, series, form in lines:
        if series.steps:
            table.add_row(name, form.format(series.last), spark(series, ramp, width), cut(extent(series, form)))
    for name, value, form, what in figures(w):
        if math.isfinite(value):
            table.add_row(name, form.format(value), what)
    return table


def cut(text: str) -> Text:
    """In one line, cut off where a column ends."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def figures(w: Watched) -> list[tuple[str, float, str, str]]:
    """(name, value, its form, what it is) of what has no curve."""
    last = w.latest | {key: number((w.end or {}).get(key)) for key in ("val_loss", "peak_memory_bytes") if w.end}
    return [
        ("memory", last.get("peak_memory_bytes", math.nan) / 1e9, "{:.2f}", "GB, the most that was in use"),
        ("MFU", last.get("mfu", math.nan), "{:.1%}", "of the device's bfloat16 peak"),
        ("at the end", last.get("val_loss", math.nan), "{:.4f}", "on the whole validation split"),
    ]


def spark(series: Series, ramp: str, width: int) -> str:
    """Medians of as many stretches as there are columns; a blank where nothing is finite."""
    _, values = medians(*series.arrays(), width)
    if not len(values):
        return ""
    low, high = values.min(), values.max()
    levels = np.rint((values - low) / (high - low or 1.0) * (len(ramp) - 1)).astype(int)
    return "".join(ramp[level] for level in levels)


def extent(series: Series, form: str) -> str:
    """Lowest and highest finite value."""
    values = series.arrays()[1]
    values = values[np.isfinite(values)]
    return f"{form.format(values.min())} .. {form.format(values.max())}" if len(values) else ""


def norms(w: Watched, width: int) -> Table:
    """Of the last look at the probed matrices; of W alone where there is little room."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(cut(f"step {w.probed:,}"))
    factors = {"sigma_A": "sigma_A", "sigma_B": "sigma_B", "stable_rank": "stable r"} if width >= ROOMY else {}
    keys = {"sigma_W": "sigma_W", **factors, "update_norm": "||dW||", "update_ratio": "of bound"}
    shown = {key: title for key, title in keys.items() if any(key in values for values in w.probes.values())}
    for title in shown.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, values in list(w.probes.items())[:SHOWN_MATRICES]:
        cells = [
            share(values.get(key, math.nan)) if key == "update_ratio" else f"{values.get(key, math.nan):.3g}"
            for key in shown
        ]
        table.add_row(cut(plain(name).removeprefix("model.")), *cells)
    if len(w.probes) > SHOWN_MATRICES:
        table.add_row(f"and {len(w.probes) - SHOWN_MATRICES} more")
    return table


def share(of_bound: float) -> Text:
    """Red above the bound."""
    return Text(f"{of_bound:.1%}", style="red" if of_bound > 1 else "")


def happened(w: Watched) -> list[Text]:
    """The last events and checkpoints."""
    lines = []
    for row in list(w.events)[-SHOWN_EVENTS:]:
        color = "red" if "action" in row else ""
        lines.append(Text(f"step {number(row.get('step')):>8,.0f}  {plain(described(row))}", style=color))
    saved = [f"{step:,}" for step in w.checkpoints()]
    if saved:
        more = "... " if len(saved) > SHOWN_CHECKPOINTS else ""
        lines.append(Text(f"checkpoints    {more}{' '.join(saved[-SHOWN_CHECKPOINTS:])}"))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return lines


def span(seconds: float) -> str:
    """h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def plain(text: Any) -> str:
    """Somebody's text, without what would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))
