"""The page: every chart is one that plotly knows, everything is in the file, and nothing that a run says is obeyed."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from written_runs import end, full_rows, probes, start, step_row, write_run

from nativerank.report.page import Sources, render, sections_of
from nativerank.report.runs import Run, read_run

go = pytest.importorskip("plotly.graph_objects")
RECORDS = Path(__file__).parents[2] / "benchmarks" / "results"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</title>"


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of each script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append((self.tags[-1][0] if self.tags else "", data))


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    return json.loads(text)


def valid(page):
    """Every chart, as plotly's own classes check it; how many there are."""
    charts = data_of(page)["charts"]
    for chart in charts:
        go.Figure(data=chart["data"], layout=chart["layout"])
    return len(charts)


def own_part(page):
    """Without plotly.js."""
    from plotly.offline import get_plotlyjs

    return page.replace(get_plotlyjs(), "")


def test_a_run_with_everything(full_run):
    page = render(Sources(runs=[read_run(full_run)]))
    assert valid(page) >= 10 and len(data_of(page)["frames"]) == 2
    ids = [chart["id"] for chart in data_of(page)["charts"]]
    for id in ("loss", "perplexity", "lr", "grad_norm", "norms", "bound", "stable_rank", "tokens_per_second"):
        assert f'id="{id}"' in page and id in ids
    for text in (
        "citizens &amp; others",
        "config.yaml",
        "torch: 2.13.0",
        "rollback to step 40",
        "Planned and measured",
    ):
        assert text in page


def test_events_are_marked_on_every_curve(full_run):
    for chart in data_of(render(Sources(runs=[read_run(full_run)])))["charts"]:
        marks = [trace for trace in chart["data"] if trace["name"] == "events"]
        assert chart["over_steps"] and len(marks) == 1
        assert marks[0]["x"] == [50, 60, 80, 160, 200]


def test_the_bound_is_counted(full_run, tmp_path):
    rows = full_rows()
    for row in rows:
        if row.get("step") == 100 and "probes" in row:
            next(iter(row["probes"].values()))["update_ratio"] = 1.25
    page = render(Sources(runs=[read_run(write_run(tmp_path / "run", rows))]))
    assert "of 6 matrices: at most 1.25; 1 of 120 looks lie above the bound 1." in page
    assert "at most 0.65; 0 of 120 looks lie above the bound 1." in render(Sources(runs=[read_run(full_run)]))


def test_of_many_matrices_some_are_drawn_and_all_are_told_of(tmp_path):
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(40)]
    rows = [start(40), *(step_row(s, 40, probes=probes(s, names)) for s in range(1, 41)), end(40)]
    page = render(Sources(runs=[read_run(write_run(tmp_path / "run", rows))]))
    charts = {chart["id"]: chart for chart in data_of(page)["charts"]}
    drawn = [trace for trace in charts["bound"]["data"] if trace.get("legendgroup")]
    assert [trace["name"].split()[0] for trace in drawn] == ["0", "5", "10", "15", "20", "24", "29", "34", "39"]
    assert [trace.get("visible", True) for trace in drawn].count(True) == 3
    assert "of 40 matrices: at most 2.35; " in charts["bound"]["summary"]  # that of the last one
    assert len(data_of(page)["frames"][1]["depths"]) == 40


def test_several_runs_over_one_another(full_run, tmp_path):
    other = write_run(tmp_path / "other", full_rows(100), "method: sct\nmodel:\n  preset: pocket\n")
    page = render(Sources(runs=[read_run(full_run), read_run(other)]))
    assert valid(page) >= 4
    for chart in data_of(page)["charts"]:
        curves, marks = chart["data"][:2], chart["data"][2:]
        assert [trace["name"] for trace in curves] == ["full", "other"]
        assert [trace["name"] for trace in marks] == ["events of full", "events of other"]
        assert [trace["marker"]["color"] for trace in curves] == [trace["marker"]["color"] for trace in marks]
    table = page[page.index('data-name="runs"') :]
    assert ">method<" in table and "model.preset" not in table  # the setting in which they differ


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDS.glob("compare-*.json")))
def test_every_comparison_that_is_committed(name):
    record = json.loads((RECORDS / name).read_text())
    page = render(Sources(comparisons=[(name, record)]))
    assert valid(page) >= 2
    rows = page[page.index("-arms") :].partition("</table>")[0].count("<tr>") - 1
    assert rows == len(record["arms"])


@pytest.mark.parametrize("part", ["arms", "cells", "curves", "title", "budget", "study"])
@pytest.mark.parametrize("value", [None, 5, "x", [5], {"a": 5}])
def test_a_damaged_comparison_is_named(part, value):
    record = json.loads((RECORDS / "compare-lr-robustness.json").read_text()) | {part: value}
    try:
        sections_of(Sources(comparisons=[("three", record)]))
    except ValueError as error:
        assert str(error).startswith("three is no comparison that `nativerank compare` wrote (")


@pytest.mark.parametrize("config", ["a: &x\n  b: *x\n", "d: 2020-99-99\n", "a: [\n", "5", "? [1]\n: 2\n"])
def test_a_config_that_cannot_be_read_has_no_settings(full_run, tmp_path, config):
    odd = read_run(write_run(tmp_path / "odd", full_rows(20), config))
    assert len(sections_of(Sources(runs=[read_run(full_run), odd]))) == 1


def test_intervals_of_means_are_students():
    from scipy.stats import t

    from nativerank.report.compare_charts import mean_interval

    low, high = mean_interval({"n": 3, "mean": 3.5, "sd": 0.03})
    assert (low + high) / 2 == pytest.approx(3.5)
    assert high - 3.5 == pytest.approx(t.ppf(0.975, 2) * 0.03 / 3**0.5)
    assert mean_interval({"n": 1, "mean": 3.5, "sd": None}) == (None, None)


def test_everything_is_in_the_file(full_run):
    page = own_part(render(Sources(runs=[read_run(full_run)])))
    elements = Elements(page)
    assert not [tag for tag, attrs in elements.tags if tag in ("link", "iframe", "img", "object", "embed")]
    assert not [attrs for tag, attrs in elements.tags if "src" in attrs]
    assert all(attrs["href"].startswith("#") for tag, attrs in elements.tags if "href" in attrs)
    assert "url(" not in page and "@import" not in page and "default-src 'none'" in page


def test_text_of_a_run_stays_text(tmp_path):
    rows = full_rows(60)
    rows[0] |= {"method": HOSTILE, "model": HOSTILE, "environment": {HOSTILE: HOSTILE}}
    rows[20] |= {"event": HOSTILE, "action": HOSTILE, "reason": HOSTILE}
    for row in rows:
        if "probes" in row:
            row["probes"] = {name + HOSTILE: values for name, values in row["probes"].items()}
    rows[-1] |= {"prompt": HOSTILE, "sample": "</pre></script>" + HOSTILE}
    run = read_run(write_run(tmp_path / "run", rows, f"method: {HOSTILE}"), HOSTILE)
    clean = read_run(write_run(tmp_path / "clean", full_rows(60)))
    for runs in ([run], [run, clean]):
        page = own_part(render(Sources(runs=runs), title=HOSTILE))
        elements = Elements(page)
        assert [tag for tag, _ in elements.tags].count("script") == 3
        assert not [attrs for tag, attrs in elements.tags if tag == "img" or any(k.startswith("on") for k in attrs)]
        assert page.count("</title>") == 1
        names = [trace["name"] for chart in data_of(page)["charts"] for trace in chart["data"]]
        names += [kind for frames in data_of(page)["frames"] for kind in frames["kinds"]]
        assert any("&lt;script&gt;" in name for name in names) and not any("<" in name for name in names)


ODD = ("x", "nan", "inf", None, True, [], [1], {}, {"a": 1}, -1, 10**400)


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:8])
def test_a_value_of_another_kind_is_shown_or_left_out(tmp_path, value):
    """In the place of every value of a start, a change of ranks, a step with probes, an event of the guard, an end."""
    rows = [row for row in full_rows(100) if "event" in row or row["step"] > 78]
    picked = [i for i, row in enumerate(rows) if row.get("event", "none") != "none" or row["step"] == 80]
    picked = list({(rows[i].get("event"), "probes" in rows[i]): i for i in picked}.values())
    assert len(picked) >= 6
    for i in picked:
        for key in rows[i]:
            changed = [*rows[:i], rows[i] | {key: value}, *rows[i + 1 :]]
            sections_of(Sources(runs=[Run("run", tmp_path, changed, "")]))
    ranks = next(row for row in rows if row.get("event") == "ranks")
    for part in (value, [value, 4], [4, value]):
        ranks["ranks"] = {"model.layers.0.mlp.up_proj": part}
        sections_of(Sources(runs=[Run("run", tmp_path, rows, "")]))


def test_damaged_lines_are_told_of(full_run, tmp_path):
    folder = write_run(tmp_path / "torn", full_rows(40))
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 7, ', '"step": 7, {', 1))
    for runs in ([read_run(folder)], [read_run(full_run), read_run(folder)]):
        page = render(Sources(runs=runs))
        assert "torn: 1 line of metrics.jsonl cannot be read and stays out, first line 8." in page


def test_200_000_rows_are_a_small_page(tmp_path):
    steps = 200_000
    rows = [start(steps), *(step_row(step, steps) for step in range(1, steps + 1)), end(steps)]
    rows[123_456]["grad_norm"] = 77.0
    page = render(Sources(runs=[read_run(write_run(tmp_path / "long", rows))]))
    assert len(page.encode()) < 6e6
    (chart,) = [chart for chart in data_of(page)["charts"] if chart["id"] == "grad_norm"]
    spike = chart["data"][0]["y"].index(77.0)
    assert chart["data"][0]["x"][spike] == 123_456
    assert max(len(trace["x"]) for c in data_of(page)["charts"] for trace in c["data"]) <= 1600


def test_a_run_that_has_only_begun(tmp_path):
    page = render(Sources(runs=[read_run(write_run(tmp_path / "run", [start(100)]))]))
    assert "at step 0 of 100" in page
    valid(page)


def test_losses_that_are_not_finite(tmp_path):
    rows = [
        start(3),
        step_row(1, 3, loss="nan"),
        step_row(2, 3, loss="inf", val_loss="nan"),
        step_row(3, 3, loss="nan"),
    ]
    page = render(Sources(runs=[read_run(write_run(tmp_path / "run", rows))]))
    valid(page)
    assert "from nan" not in page and "to nan" not in page
    rows[1] = step_row(1, 3, loss=3.5)
    assert "Training loss from 3.500 to 3.500" in render(Sources(runs=[read_run(write_run(tmp_path / "two", rows))]))


def test_without_plotly_one_line_says_what_to_install(full_run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ValueError, match=r"nativerank report needs the extra `report`: pip install"):
        render(Sources(runs=[read_run(full_run)]))
