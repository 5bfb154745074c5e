"""The report: one HTML file that needs nothing else, from runs, comparisons and sweeps.

    nativerank report RUN ...

Everything is in the file: plotly.js, styles, data. A policy in its head forbids it any connection. Text that came from
a run is escaped where it enters the page: by the template engine, in the data (which is JSON inside a script element),
and in plotly's labels (`charts.label`).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nativerank.extras import require
from nativerank.report.charts import NAMES, Section
from nativerank.report.compare_charts import comparison_section
from nativerank.report.group_charts import event_table as events_of_all
from nativerank.report.group_charts import overlays, run_table
from nativerank.report.overview import cards, cost_table, environment
from nativerank.report.run_charts import axes, event_table, figure_charts, loss_charts, mark_events, rate_chart, sample
from nativerank.report.runs import Run
from nativerank.report.spectra_charts import maps, probed, spectral_charts
from nativerank.report.sweep_charts import sweep_section
from nativerank.version import __version__

TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class Sources:
    """What a report is made of.

    Attributes:
        runs: run folders. planned: name of a run -> its plan, as `nativerank plan --json` has it, or why there is none.
        comparisons: (name, record of compare.json). sweeps: (name, fit or None, decision or None, rows of cells).
    """

    runs: list[Run] = field(default_factory=list)
    planned: dict[str, dict[str, Any] | str] = field(default_factory=dict)
    comparisons: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    sweeps: list[tuple[str, dict[str, Any] | None, dict[str, Any] | None, list[dict[str, Any]]]] = field(
        default_factory=list
    )


def render(sources: Sources, title: str = "") -> str:
    """The page.

    Raises:
        ValueError: plotly or jinja2 is not installed.
    """
    require("plotly", "report", "nativerank report")
    jinja2 = require("jinja2", "report", "nativerank report")
    from plotly.offline import get_plotlyjs

    sections = sections_of(sources)
    name = title or title_of(sources)
    environment_ = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    scripts = {"plotly": get_plotlyjs(), "style": text_of("page.css"), "script": text_of("page.js")}
    data: dict[str, Any] = {
        "axes": {run.name: axes(run) for run in sources.runs},
        "charts": [chart.as_dict() for section in sections for chart in section.charts],
        "frames": [asdict(frames) for section in sections for frames in section.frames],
    }
    page = environment_.get_template("page.html").render(
        title=name,
        version=__version__,
        sections=sections,
        cards=cards(sources.runs[0]) if len(sources.runs) == 1 else [],
        switchable=any(chart["over_steps"] for chart in data["charts"]),
        units=units(data["axes"]),
        data=script_safe(data),
        **scripts,
    )
    return str(page)


def text_of(name: str) -> str:
    """A file beside the template."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def script_safe(data: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def units(found: dict[str, dict[str, Any]]) -> list[str]:
    """What steps of every run can be shown as."""
    return [name for name in NAMES if found and all(name in own for own in found.values())]


def title_of(sources: Sources) -> str:
    """A name for the page, if nobody gave one."""
    names = [run.name for run in sources.runs]
    names += [name for name, _ in sources.comparisons] + [sweep[0] for sweep in sources.sweeps]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def sections_of(sources: Sources) -> list[Section]:
    """The page from top to bottom; parts with nothing to say are left out."""
    found: list[Section] = []
    if len(sources.runs) == 1:
        found += run_sections(sources.runs[0], sources.planned)
    elif sources.runs:
        happened = [events_of_all(sources.runs)] if any(run.events for run in sources.runs) else []
        lead = [run_table(sources.runs)]
        charts = mark_events(overlays(sources.runs), sources.runs)
        found.append(Section("runs", "Runs", notes=gaps(sources.runs), lead=lead, charts=charts, tables=happened))
    found += [comparison_section(*named, id=f"compare-{i}") for i, named in enumerate(sources.comparisons)]
    found += [sweep_section(*sweep, id=f"sweep-{i}") for i, sweep in enumerate(sources.sweeps)]
    return [s for s in found if s.charts or s.frames or s.lead or s.tables or s.texts or s.notes]


def gaps(runs: list[Run]) -> list[str]:
    """What of their files is not shown."""
    return [run.gaps for run in runs if run.gaps]


def run_sections(run: Run, planned: dict[str, dict[str, Any] | str]) -> list[Section]:
    """Everything about one run."""
    seen = probed(run)
    training = [*loss_charts(run), rate_chart(run), *figure_charts(run, ("grad_norm",))]
    speed = figure_charts(run, ("tokens_per_second", "mfu", "optimizer_share", "peak_memory_bytes", "guide_alpha"))
    sections = [
        Section("training", "Training", notes=gaps([run]), charts=mark_events(training, [run])),
        Section("spectra", "Spectra", charts=mark_events(spectral_charts(run, seen), [run]), frames=maps(run, seen)),
        Section("speed", "Speed and memory", charts=mark_events(speed, [run])),
        Section("cost", "Cost: planned and measured", tables=[cost_table(run, planned.get(run.name))]),
        Section("samples", "Samples", texts=sample(run)),
    ]
    if run.events:
        sections.append(Section("events", "What happened", tables=[event_table(run)]))
    texts = [("config.yaml", run.config)] if run.config else []
    sections.append(Section("config", "Configuration and environment", texts=[*environment(run), *texts], folded=True))
    return sections
