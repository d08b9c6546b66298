"""The page: whole in itself, harmless whatever the text, and with everything that was measured."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
from conftest import recipe_text
from runs import TRAINING, TRIALS, make_run

from flapkit.run.report import view
from flapkit.run.report.page import render_comparison, render_run, tiles
from flapkit.run.report.report_record import SampleRecord

VOID = {"meta", "link", "br"}


class Tags(HTMLParser):
    """Checks that tags close in order, and gathers ids and whatever is linked."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.problems = [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [value for key, value in attrs if key in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


PAGES = {
    "a run": lambda: render_run(make_run()),
    "no tasks": lambda: render_run(make_run(tasks=False)),
    "trials": lambda: render_run(make_run(search=TRIALS)),
    "a training": lambda: render_run(make_run(search=TRAINING)),
    "many layers": lambda: render_run(make_run(layers=40)),
    "two runs": lambda: render_comparison([make_run("a", 0.2), make_run("b", 0.5)]),
    "ten runs": lambda: render_comparison([make_run(f"r{ratio}", ratio / 20, tasks=False) for ratio in range(1, 11)]),
}


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_whole(page):
    text = PAGES[page]()
    tags = parse(text)
    assert (tags.open, tags.problems) == ([], [])
    assert len(tags.ids) == len(set(tags.ids))
    assert all(link.startswith("#") and link[1:] in tags.ids for link in tags.links if link != "data:,")
    assert "default-src 'none'" in text
    assert not re.search(r"""url\(\s*['"]?http|@import|fetch\(|XMLHttpRequest""", text.replace("xmlns", ""))


@pytest.mark.parametrize(
    "changes", [{"perplexity": {}}, {"seconds": {}}, {"perplexity": {}, "seconds": {}, "warnings": []}]
)
def test_what_was_not_measured_is_left_out(changes):
    page = render_run(make_run(tasks=False, **changes))
    assert ('id="perplexity"' in page) == ("perplexity" not in changes)
    assert 'id="zero-shot"' not in page
    assert 'id="search"' not in page


def test_a_searcher_that_scores_nothing_has_no_scores_to_show():
    run = make_run()
    sites = tuple(dataclasses.replace(site, scores=None) for site in run.record.sites)
    page = render_run(dataclasses.replace(run, record=dataclasses.replace(run.record, sites=sites, axes={})))
    assert 'id="scores"' not in page
    assert 'id="structure"' in page


def test_hostile_text_stays_text():
    run = make_run()
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    record = dataclasses.replace(run.record, model=evil, samples=(SampleRecord(evil, evil, evil),))
    result = {**run.result, "perplexity": {evil: {"dense": 4.0, "pruned": 5.0}}, "warnings": [f"`{evil}`"]}
    run = dataclasses.replace(run, name=evil, record=record, result=result, recipe=f"output: '{evil}'")
    for page in (render_run(run), render_comparison([run, make_run("b")])):
        assert "<script>alert" not in page
        assert "<img" not in page


def test_the_verdict_says_what_was_asked_and_what_came_of_it():
    page = render_run(make_run(ratio=0.3))
    assert re.search(r"(29\.\d|30\.0) % of the block parameters removed \(budget 30\.0 %\)", page)
    assert "rose from 4.00 to 5.00" in page
    assert "<code>bias</code>" in page


def test_the_figures_of_the_page_are_json():
    (figures,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', render_run(make_run()))
    assert set(json.loads(figures)) == {"structure", "scores", "search", "errors", "zero_shot"}


def test_speed_is_shown_where_it_was_measured():
    bench = {"ratios": {"prefill": 1.21, "decode": 1.1}, "expected": 1.25}
    page = render_run(dataclasses.replace(make_run(), bench=bench))
    assert f"{view.TIMES} 1.21" in page
    assert "1.25 expected" in page


def test_a_comparison_names_the_best_and_what_differs():
    first, second = make_run("a", 0.2), make_run("b", 0.5)
    second.result["perplexity"]["text, 128 tokens"]["pruned"] = 9.0
    page = render_comparison([first, dataclasses.replace(second, recipe=recipe_text(budget={"ratio": 0.5}))])
    assert "Lowest perplexity on text: 5.00, by a" in page
    assert "<code>budget.ratio</code>" in page


def test_tiles_have_names_of_their_own():
    texts = {"a, 128 tokens": {"dense": 4.0, "pruned": 5.0}, "b, 128 tokens": {"dense": 6.0, "pruned": 7.0}}
    labels = [tile.label for tile in tiles(make_run(perplexity=texts))]
    assert {"Perplexity, a, 128 tokens", "Perplexity, b, 128 tokens"} < set(labels)
    assert len(set(labels)) == len(labels)


def test_one_is_no_plural():
    once = {"objective": "perplexity", "trials": 1, "values": {"1": 30.5}}
    page = render_run(make_run(search=once))
    text = re.sub(r"<[^>]+>", "", page.partition("<main")[0].partition("<body")[2] + page.partition("<main")[2])
    assert re.findall(r"(?<![\d.,])1 (?!is\b|was\b)[a-z]+s\b", text) == []


def test_the_menu_has_the_words_of_the_headings():
    for run in (make_run(search=TRIALS), make_run(tasks=False, perplexity={})):
        page = render_run(run)
        (menu,) = re.findall(r"<nav.*?</nav>", page, flags=re.DOTALL)
        headings = re.findall(r'<h2 id="([\w-]+)">(.*?)</h2>', page.partition("<main")[2])
        assert re.findall(r'<a href="#([\w-]+)">(.*?)</a>', menu) == headings


def test_a_chart_without_values_is_a_note():
    run = make_run()
    sites = [dataclasses.replace(site, error=None) if site.kind == "attention" else site for site in run.record.sites]
    run = dataclasses.replace(run, record=dataclasses.replace(run.record, sites=sites))
    for page in (render_run(run), render_comparison([run, run])):
        assert page.count('data-chart="errors"') == 1
        assert "No errors" in page
    assert "No errors" not in render_comparison([make_run(ratio=0.5), make_run(ratio=0.5)])


def test_titles_tell_runs_apart():
    pages = [
        render_run(make_run()),
        render_run(make_run(ratio=0.5)),
        render_comparison([make_run("a"), make_run("b")]),
        render_comparison([make_run("a"), make_run("c")]),
    ]
    titles = {re.search(r"<title>(.*?)</title>", page)[1] for page in pages}
    assert len(titles) == len(pages)
    assert "wifv + al_am + bias" in re.search(r"<title>(.*?)</title>", pages[0])[1]


def test_no_two_runs_of_a_comparison_look_the_same():
    page = render_comparison([make_run(f"r{ratio}", ratio / 20, tasks=False) for ratio in range(1, 11)])
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    marks = re.findall(r'<span class="mark.*?>', table)
    assert len(set(marks)) == len(marks) == 10
