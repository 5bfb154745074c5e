"""What a page shows, as plain data: charts (plotly's JSON, drawn by plotly.js on the page), tables and maps.

A chart says in a sentence what it shows, which is also what a screen reader reads. Names of runs and modules are
somebody's text: plotly understands some HTML in them, so they are escaped here, once, where they become labels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import numpy as np

from nativerank.report.thin import POINTS, extremes, short

Trace = dict[str, Any]

# Seen by most colour-blind eyes, on white and on black (after Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d", "#7f7f7f", "#66a61e")
DASHES = ("solid", "dash", "dot", "dashdot")
STEP, NAMES = "step", {"step": "step", "tokens": "tokens", "flops": "training FLOPs", "hours": "hours"}
HEIGHT, LEGEND_ROW, LEGEND_LETTERS = 300, 20, 70


@dataclass(frozen=True)
class Chart:
    """One figure.

    Attributes:
        id: of the page element. title: heading. summary: what is to be seen, in a sentence or two.
        data: plotly traces; x counts steps where `over_steps`. layout: of plotly, colours left to the page.
        over_steps: x may be shown in tokens, FLOPs or hours instead, and is zoomed together with others.
        wide: takes the whole width.
    """

    id: str
    title: str
    summary: str
    data: list[Trace]
    layout: dict[str, Any]
    over_steps: bool = False
    wide: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For the page, as high as its legend needs."""
        width = sum(len(trace["name"]) + 6 for trace in self.data if trace.get("showlegend", True))
        rows = -(-width // LEGEND_LETTERS)
        shape: dict[str, Any] = {"height": HEIGHT + LEGEND_ROW * max(0, rows - 1)}
        shape["hovermode"] = "x unified" if self.over_steps else "closest"
        return asdict(self) | {"layout": self.layout | shape}


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers are sorted as such and stand right."""

    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """Rows that can be sorted, filtered and saved as CSV.

    Attributes:
        rows: of (shown, value) pairs: value is what is sorted by and saved.
    """

    id: str
    title: str
    columns: list[Column]
    rows: list[list[tuple[str, Any]]]
    note: str = ""


@dataclass(frozen=True)
class Frames:
    """A map of matrices (kind x depth) that changes along the run, moved by a slider.

    Attributes:
        steps: of the frames. depths: of the layers. kinds: of matrices.
        values: quantity -> frame -> kind -> depth, null where there is none.
    """

    id: str
    title: str
    summary: str
    steps: list[int]
    depths: list[str]
    kinds: list[str]
    values: dict[str, list[list[list[float | None]]]]


@dataclass
class Section:
    """A part of the page: sentences, a leading table, charts, maps, tables, and texts with a heading."""

    id: str
    title: str
    notes: list[str] = field(default_factory=list)
    lead: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    frames: list[Frames] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    folded: bool = False


def line(name: str, x: Any, y: Any, color: str, run: str = "", **more: Any) -> Trace:
    """A curve, thinned so that no minimum or maximum is lost.

    Args:
        name: as somebody wrote it. x, y: (n,) numbers. run: whose steps x counts, for other units of it.
        more: of the trace; `dash` and `width` of its line; `points` that it may have.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    kept = extremes(y, more.pop("points", POINTS))
    look = {"color": color, "width": more.pop("width", 1.5), "dash": more.pop("dash", "solid")}
    mode = more.pop("mode", "lines" if len(kept) > 1 else "markers")
    trace: Trace = {"type": "scatter", "mode": mode, "name": label(name), "x": short(x[kept]), "y": short(y[kept])}
    return trace | {"line": look, "marker": {"color": color, "size": 6}, "meta": run} | more


def dots(name: str, x: Any, y: Any, color: str, run: str = "", **more: Any) -> Trace:
    """Points, all of them."""
    return line(name, x, y, color, run, mode="markers", **more)


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str, **more: Any) -> list[Trace]:
    """An interval around a curve, without an entry of its own in the legend."""
    outline = {
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
        "type": "scatter",
        "line": {"width": 0},
    } | more
    ends = (short(np.asarray(values, dtype=float)) for values in (low, high))
    lower, upper = ({**outline, "x": list(x), "y": values} for values in ends)
    return [lower, upper | {"fill": "tonexty", "fillcolor": faint(color)}]


def faint(color: str, alpha: float = 0.15) -> str:
    """rgba of a #rrggbb colour."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def label(text: str) -> str:
    """Somebody's text where plotly would read HTML."""
    return escape(str(text), quote=False)


def layout(y: str, x: str = NAMES[STEP], **more: Any) -> dict[str, Any]:
    """Axes with their titles; `log` names those that are logarithmic."""
    log = more.pop("log", "")
    axes = {
        "xaxis": {"title": {"text": x}, "type": "log" if "x" in log else "linear"},
        "yaxis": {"title": {"text": y}, "type": "log" if "y" in log else "linear"},
    }
    for name, axis in axes.items():
        if axis["type"] == "log":
            axis |= {"exponentformat": "power", "dtick": more.pop(f"{name}_dtick", None)}
    return {**axes, **more}


def color_of(number: int) -> str:
    """The number-th colour, round and round."""
    return COLORS[number % len(COLORS)]


def dash_of(number: int) -> str:
    """Another dash each time that the colours begin again."""
    return DASHES[number // len(COLORS) % len(DASHES)]


def span(values: Iterable[float]) -> str:
    """From the lowest to the highest finite number, in words."""
    finite = [v for v in values if np.isfinite(v)]
    if not finite:
        return "nothing finite"
    low, high = f"{min(finite):.4g}", f"{max(finite):.4g}"
    return low if low == high else f"{low} to {high}"
