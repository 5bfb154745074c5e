"""The page in a real browser: every panel draws, nothing is said on the console, and what can be touched works.

Needs Chromium on the machine (`apt-get install chromium`), which `.ci/run` installs, and the extra `dev`.
"""

import csv
import io
import json
import shutil

import pytest
from test_page import HOSTILE, RECORDS
from written_runs import MODULES, full_rows, write_run

from nativerank.report.page import Sources, render
from nativerank.report.runs import read_run

playwright = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")

# Without a network its own questions to the outside fail one after the other; as root it needs --no-sandbox.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as control:
        browser = control.chromium.launch(executable_path=PROGRAM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page and waits until all is drawn; at the end nothing may have been said or asked for."""
    said, pages = [], []

    def show(text, **options):
        file = tmp_path / f"page-{len(pages)}.html"
        file.write_text(text, encoding="utf-8")
        page = browser.new_page(**{"viewport": {"width": 1300, "height": 900}} | options)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=120_000)
        pages.append(page)
        return page

    yield show
    for page in pages:
        page.close()
    assert said == []


@pytest.fixture(scope="module")
def page_of_all(full_run):
    """A run, as a page."""
    return render(Sources(runs=[read_run(full_run)]))


FILLED = "[...document.querySelectorAll('.plot')].filter((plot) => plot.querySelector('.trace, .hm')).length"


def test_every_panel_draws(show, page_of_all):
    page = show(page_of_all)
    assert page.locator(".plot").count() == page.evaluate(FILLED) >= 12
    for plot in page.locator(".plot").all():
        box = plot.bounding_box()
        assert box["width"] > 300 and box["height"] > 150


def test_hover_shows_the_value(show, page_of_all):
    page = show(page_of_all)
    plot = page.locator("#loss")
    plot.scroll_into_view_if_needed()
    box = plot.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    text = plot.locator(".hoverlayer text").first
    text.wait_for()
    assert any(character.isdigit() for character in text.text_content())


def test_arrow_keys_step_through_points(show, page_of_all):
    page = show(page_of_all)
    page.locator("#lr").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#live").text_content().startswith("matrices: x 2, y 0.0797")
    page.keyboard.press("ArrowDown")
    assert page.locator("#live").text_content().startswith("everything else: x 2")
    page.keyboard.press("End")
    assert "x 400" in page.locator("#live").text_content()


def test_steps_as_tokens_flops_and_hours(show, page_of_all):
    page = show(page_of_all)

    def last_x():
        return page.evaluate("document.getElementById('lr').data[0].x.at(-1)")

    assert last_x() == 400
    for unit, value, title in (
        ("tokens", 409_600, "tokens"),
        ("flops", 6e11, "training FLOPs"),
        ("hours", 20 / 3600, "hours"),
    ):
        page.select_option("#unit", unit)
        assert last_x() == pytest.approx(value, rel=1e-4)
        assert page.locator("#lr .xtitle").text_content() == title
    page.select_option("#unit", "step")
    page.check("#logx")
    assert page.evaluate("document.getElementById('lr').layout.xaxis.type") == "log"


def test_zooming_one_chart_zooms_the_others(show, page_of_all):
    page = show(page_of_all)
    page.evaluate("Plotly.relayout('loss', {'xaxis.range[0]': 100, 'xaxis.range[1]': 200})")
    page.wait_for_timeout(200)
    assert page.evaluate("document.getElementById('lr').layout.xaxis.range") == [100, 200]
    page.click("#reset")
    page.wait_for_timeout(200)
    assert page.evaluate("document.getElementById('lr').layout.xaxis.range")[1] >= 399


def test_the_map_follows_its_slider(show, page_of_all):
    page = show(page_of_all)
    figure = page.locator('[data-frames="ranks"]')

    def cells():
        return page.evaluate("document.getElementById('ranks-map').data[0].z")

    assert cells() == [[24, 24, 24], [24, 24, 24]]
    figure.locator(".time").focus()
    page.keyboard.press("Home")
    assert cells() == [[32, 32, 32], [32, 32, 32]] and figure.locator("output").text_content() == "0"
    figure.locator(".time").fill("1")
    figure.locator(".quantity").select_option("energy kept at the last look")
    assert cells()[0] == [0.97, 0.97, None]
    assert figure.locator(".time").get_attribute("aria-valuetext") == "step 80"


def test_ranks_that_are_all_the_same_need_no_scale(show, tmp_path):
    rows = [row for row in full_rows(60) if row.get("event") != "ranks"]
    page = show(render(Sources(runs=[read_run(write_run(tmp_path / "run", rows))])))
    assert page.locator("#ranks-map .hm").count() == 1 and page.locator("#ranks-map .colorbar").count() == 0


def test_light_and_dark(show, page_of_all):
    def look(page):
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return back, page.evaluate("document.getElementById('loss').layout.font.color")

    light, dark = (look(show(page_of_all, color_scheme=scheme)) for scheme in ("light", "dark"))
    assert light[0] != dark[0] and light[1] != dark[1]
    page = show(page_of_all, color_scheme="light")
    page.click("#theme")
    assert look(page) == dark
    page.click("#theme")
    assert look(page) == light


@pytest.mark.parametrize("name", ["compare-frames.json", "compare-equal-flops.json"])
def test_long_names_leave_a_phone_its_width_and_curves_their_room(show, name):
    record = json.loads((RECORDS / name).read_text())
    text = render(Sources(comparisons=[(name, record)]))
    wide, phone = (show(text, viewport={"width": width, "height": 800}) for width in (1300, 375))
    assert phone.evaluate("document.documentElement.scrollWidth") == 375
    for page in (wide, phone):
        heights = "[...document.querySelectorAll('.plot')].map((plot) => plot._fullLayout._size.h)"
        assert min(page.evaluate(heights)) > 140


def test_it_prints_in_light(show, page_of_all):
    page = show(page_of_all, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert page.pdf().startswith(b"%PDF")


def test_tables_sort_filter_and_save(show, tmp_path):
    record = json.loads((RECORDS / "compare-lr-robustness.json").read_text())
    page = show(render(Sources(comparisons=[("rates", record)])))
    table = page.locator('[data-name="compare-0-cells"]')
    head = table.locator("th", has_text="validation loss")
    column = [head.evaluate("(cell) => cell.cellIndex")]

    def values():
        found = table.evaluate(
            "(box, i) => [...box.querySelectorAll('tbody tr:not([hidden])')].map((row) => row.cells[i].dataset.value)",
            column[0],
        )
        return [float(text) for text in found if text]

    losses = values()
    head.locator("button").press("Enter")  # by keyboard
    assert values() == sorted(losses) and head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert values() == sorted(losses, reverse=True) and head.get_attribute("aria-sort") == "descending"
    table.locator(".filter").fill("muon 0.02")
    kept = values()
    assert (
        0 < len(kept) < len(losses) and table.locator(".count").text_content() == f"{len(kept)} of {len(losses)} rows"
    )
    with page.expect_download() as download:
        table.locator(".csv").click()
    file = tmp_path / "saved.csv"
    download.value.save_as(file)
    rows = list(csv.reader(io.StringIO(file.read_text())))
    assert len(rows) == 1 + len(kept) and [float(row[column[0]]) for row in rows[1:]] == kept
    assert download.value.suggested_filename == "compare-0-cells.csv"


def test_a_csv_holds_no_formula(show, tmp_path):
    folder = write_run(tmp_path / "run", full_rows(60))
    runs = [read_run(folder, "=1+1"), read_run(folder, "plain")]
    page = show(render(Sources(runs=runs)))
    with page.expect_download() as download:
        page.locator('[data-name="runs"] .csv').click()
    file = tmp_path / "saved.csv"
    download.value.save_as(file)
    assert [row[0] for row in csv.reader(io.StringIO(file.read_text()))] == ["run", "'=1+1", "plain"]


def test_what_a_run_says_is_shown_not_obeyed(show, tmp_path):
    rows = full_rows(60)
    rows[0]["method"] = HOSTILE
    rows[-1]["sample"] = HOSTILE
    runs = [read_run(write_run(tmp_path / "run", rows), HOSTILE), read_run(write_run(tmp_path / "b", full_rows(60)))]
    page = show(render(Sources(runs=runs)))
    assert page.locator("#losses .legendtext").first.text_content().startswith("<script>alert(1)")
    show(render(Sources(runs=runs[:1])))


def test_it_can_be_used_without_eyes(show, page_of_all):
    page = show(page_of_all)
    assert page.evaluate("document.documentElement.lang") == "en"
    for plot in page.locator(".plot").all():
        assert page.locator(f"[id='{plot.get_attribute('aria-labelledby')}']").count() == 1
        assert len(page.locator(f"[id='{plot.get_attribute('aria-describedby')}']").text_content()) > 10
    assert (
        page.evaluate("new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size")
        == page.locator("[id]").count()
    )
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert len(MODULES) == 6 and page.locator("h1").count() == 1
