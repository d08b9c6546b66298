"""The page in a real browser: headless Chromium, as a reader meets it. Needs `playwright` and Debian's `chromium`."""

from __future__ import annotations

import dataclasses
import shutil
from importlib.resources import files

import pytest
from runs import TRAINING, TRIALS, make_run

from flapkit.run.report.document import RunDocument
from flapkit.run.report.page import render_comparison, render_run

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = {"phone": 360, "tablet": 768, "desktop": 1280}
SERIOUS = {"serious", "critical"}
WATCH_SHIFTS = """
window.shift = 0;
new PerformanceObserver((list) => list.getEntries().forEach((each) => (window.shift += each.value)))
  .observe({ type: "layout-shift", buffered: true });
"""
IS_INSIDE = """
(box) => {
  const [inner, outer] = [box.querySelector("svg"), box].map((each) => each.getBoundingClientRect());
  return inner.width <= outer.width + 1 && inner.height <= outer.height + 1;
}
"""


def without_errors(run: RunDocument, layer: int) -> RunDocument:
    """Leave out the errors of a layer, as where it lost no units."""
    sites = [dataclasses.replace(site, error=None) if site.layer == layer else site for site in run.record.sites]
    return dataclasses.replace(run, record=dataclasses.replace(run.record, sites=sites))


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "run": render_run(make_run(layers=6, search=TRIALS)),
        "large": render_run(make_run(layers=48, search=TRAINING)),
        "once": render_run(make_run(search={"objective": "perplexity", "trials": 1, "values": {"1": 30.5}})),
        "gaps": render_comparison([without_errors(make_run("a", 0.5, layers=9), 4), make_run("b", 0.5, layers=9)]),
        "comparison": render_comparison([make_run("a", 0.2), make_run("b", 0.5), make_run("c", 0.4)]),
    }
    for name, html in made.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return folder


@pytest.fixture
def visit(browser, pages):
    """Open a page offline; fail the test if anything was fetched or an error reached the console."""
    contexts, problems = [], []

    def open_(name, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=False, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else problems.append(request.url),
        )
        page.add_init_script(WATCH_SHIFTS)
        page.goto((pages / f"{name}.html").as_uri())
        page.wait_for_function(
            "[...document.querySelectorAll('[data-chart]')].every((box) => box.querySelector('svg'))"
        )
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "large", "comparison"])
def test_it_opens_fits_and_does_not_move(visit, name, width):
    page = visit(name, WIDTHS[width])
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_timeout(200)
    assert page.evaluate("window.shift") == 0
    for box in page.locator("[data-chart]").all():
        inside = box.evaluate(IS_INSIDE)
        assert inside, box.get_attribute("data-chart")


def test_hovering_says_the_values(visit):
    page = visit("run")
    box = page.locator("[data-chart=structure][data-kind=mlp]")
    box.scroll_into_view_if_needed()
    at = box.bounding_box()
    page.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    tip = box.locator("[aria-label=tip]")
    tip.locator("tspan").first.wait_for()
    assert " of 48 kept" in tip.text_content()


@pytest.mark.parametrize("chart", ["structure", "scores", "search", "errors", "zero_shot", "tradeoff"])
def test_the_arrow_keys_say_the_values(visit, chart):
    page = visit("comparison" if chart == "tradeoff" else "run")
    box = page.locator(f"[data-chart={chart}]").last
    box.focus()
    said = []
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        said.append(page.locator("#announcement").text_content())
        shown = box.locator("[aria-label=tip]").text_content()
        assert said[-1].split(",")[0].split("\n")[0] in shown
    assert len(set(said)) > 1
    page.keyboard.press("Escape")
    assert page.locator("#announcement").text_content() == ""


@pytest.mark.parametrize("name", ["run", "large", "once"])
def test_the_numbers_of_a_search_are_not_cut(visit, name):
    """Also where there is one value, so that the axis has no extent of its own."""
    box = visit(name, WIDTHS["phone"]).locator("[data-chart=search] svg").last
    left = box.bounding_box()["x"]
    labels = box.locator("[aria-label='y-axis tick label'] text").all()
    assert len(labels) > 1
    assert all(label.bounding_box()["x"] >= left for label in labels)


def test_dark_and_light_are_the_readers(visit):
    def ground_and_bar(scheme):
        page = visit("run", color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        bar = page.evaluate("getComputedStyle(document.querySelectorAll('[aria-label=bar]')[1].children[0]).fill")
        return ground, bar

    light, dark = ground_and_bar("light"), ground_and_bar("dark")
    assert light[0] != dark[0]
    assert light[1] != dark[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_axe_finds_nothing_serious(visit, name, scheme):
    axe = pytest.importorskip("axe_playwright_python")
    page = visit(name, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    page.evaluate(files(axe).joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    serious = [(each["id"], each["nodes"][0]["html"]) for each in found["violations"] if each["impact"] in SERIOUS]
    assert serious == []
    assert len(found["passes"]) > 10


def test_paper_shows_everything(visit):
    page = visit("run")
    assert not page.locator("details.numbers").first.evaluate("(each) => each.open")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("details.numbers").first.evaluate("(each) => each.open")
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert not page.locator("details.numbers").first.evaluate("(each) => each.open")


def test_without_scripts_the_numbers_are_there(visit, browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((pages / "run.html").as_uri())
    assert page.locator("details.numbers table").count() >= 4
    assert page.locator(".verdict").is_visible()
    context.close()


def test_lines_join_neighbours_and_show_what_coincides(visit):
    page = visit("gaps")
    box = page.locator("[data-chart=errors][data-kind=mlp]")
    lines = box.locator("[aria-label=line] path").evaluate_all(
        """paths => paths.map((path) =>
             [path.getAttribute("d").split("M").length - 1, parseFloat(getComputedStyle(path).strokeWidth)])"""
    )
    assert [pieces for pieces, _ in lines] == [2, 1]
    assert lines[0][1] > lines[1][1]
