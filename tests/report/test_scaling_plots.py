"""Figures of a scaling fit show every group and every run, the same bytes from the same record."""

import math

import pytest

from nativerank.report.scaling_plots import draw, draw_saving


def group(method, ratio, shift=0.0):
    """A group with two budgets, made by hand."""
    runs = [
        {"params": n, "tokens": c / 6 / n, "flops": c, "budget": c, "loss": 3 + shift + math.log(n / c**0.5) ** 2 / 50}
        for c in (1e18, 4e18)
        for n in (c**0.5 * f for f in (0.1, 0.2, 0.4, 0.8))
    ]
    profiles = [
        {"flops": c, "sizes": 4, "params": 0.3 * c**0.5, "tokens": 0.5 * c**0.5, "loss": 3.0, "fault": None}
        for c in (1e18, 4e18)
    ]
    curve = {"flops": [1e18, 4e18, 1e20], "best": [3e8, 6e8, 3e9], "band": [[2e8, 4e8], [5e8, 7e8], None]}
    law = {"E": 1.8, "A": 400.0, "B": 2000.0, "alpha": 0.35, "beta": 0.36}
    curves = {"runs": runs, "isoflop": {"profiles": [], "params": curve, "tokens": curve}}
    return {
        "method": method,
        "rank_ratio": ratio,
        "isoflop": {"profiles": profiles},
        "parametric": law,
        "curves": curves,
    }


@pytest.fixture
def found():
    groups = {"dense-muon": group("dense-muon", None)}
    groups |= {f"spectron rho={r}": group("spectron", r, 0.1 * k) for k, r in enumerate((0.125, 0.25, 0.5))}
    best = [{"flops": c, "rank_ratio": 0.3, "rank_interval": [0.2, 0.4]} for c in (1e18, 4e18)]
    return {"groups": groups, "surface": {"spectron": {"best": best}}, "warnings": []}


def test_every_group_has_its_panel_and_its_line(found, tmp_path):
    files = draw(found, tmp_path)
    assert [file.name for file in files] == ["isoflop.svg", "frontier.svg", "losses.svg", "rank.svg"]
    for file in files[:3]:
        text = file.read_text()
        for name in found["groups"]:
            assert f"<!-- {name} -->" in text, f"{name} is not in {file.name}"
    again = tmp_path / "again"
    again.mkdir()
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in draw(found, again)]


def test_runs_of_every_loss_lie_inside_the_panels(found, tmp_path, monkeypatch):
    """The groups' losses differ; the panels share one scale that holds them all."""
    from nativerank.report import scaling_plots

    figures = []
    monkeypatch.setattr(scaling_plots, "save", lambda figure, file: figures.append(figure) or file)
    draw(found, tmp_path)
    losses = [run["loss"] for g in found["groups"].values() for run in g["curves"]["runs"]]
    panels = figures[0].axes
    assert len(panels) == 4 and len({panel.get_ylim() for panel in panels}) == 1
    low, high = panels[0].get_ylim()
    assert low < min(losses) and max(losses) < high


def test_without_a_surface_or_laws_fewer_are_drawn(found, tmp_path):
    for entry in found["groups"].values():
        entry["parametric"] = None
    assert [file.name for file in draw({**found, "surface": None}, tmp_path)] == ["isoflop.svg", "frontier.svg"]


def test_a_wild_interval_does_not_flatten_the_saving(tmp_path, monkeypatch):
    from nativerank.report import scaling_plots

    figures = []
    monkeypatch.setattr(scaling_plots, "save", lambda figure, file: figures.append(figure) or file)
    flops = [1e18, 1e20, 1e26]
    curve = {"flops": flops, "best": [0.2, 0.3, 0.4], "band": [[0.1, 0.3], [0.0, 0.4], [-1e9, 1.0]]}
    paper = {"flops": flops, "saving": [0.3, 0.4, 0.48], "label": "paper"}
    draw_saving({"saving": {"curve": curve, "last_budget": 1e18, "paper": paper}}, tmp_path / "saving.svg")
    assert figures[0].axes[0].get_ylim() == (-100, 100)
