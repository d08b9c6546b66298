"""The files of a run, changed by somebody: a report shows them as they are, or refuses them in words; none is run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from conftest import recipe_text, write_recipe
from fuzzing import DAMAGE, VALUES, cases, damaged, put_back, read, tampered
from hypothesis import given
from hypothesis import strategies as st
from runs import make_run

from flapkit.run.report import RunDocument, draw_figures, render_comparison, render_run

RUN = make_run(layers=2)
BENCH = {"ratios": {"prefill": 1.1, "decode": 1.2}, "expected": 1.25}
FIGURES = {"dense": 4.0, "pruned": 5.0, "recovered": 4.5, "bits_per_byte": {"dense": 1.5}, "length": 128}
FILES: dict[str, Any] = {
    "report.json": json.loads(RUN.record.to_json()),
    "result.json": {**RUN.result, "perplexity": {"text, 128 tokens": FIGURES}},
    "flapkit.json": dict(RUN.made),
    "bench.json": BENCH,
}
MARKUP = st.sampled_from(
    [
        "<script>alert(1)</script>",
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "</title><img src=x onerror=alert(1)>",
        '"><svg onload=alert(1)>',
        "' onfocus='alert(1)' x='",
        '" style="background: url(//x)" x="',
        "</style>",
        "]]>",
        "javascript:alert(1)",
        "{{ 7 * 7 }}{% raw %}",
        "&lt;script&gt;",
        "`</code><b>`",
        "\u2028</script>",
        "data:text/html,x",
    ]
)


OWN = [
    files("flapkit.run.report").joinpath(name).read_text(encoding="utf-8")
    for name in ("vendor/plot.js", "templates/charts.js", "templates/style.css")
]
TAG = re.compile(r"<[^<>]*>")
DATA = re.compile(r'<script type="application/json" id="figures">([^<]*)</script>')
LINK = re.compile(r' (?:href|src|style|content|http-equiv)="([^"]*)"')
HARMLESS = re.compile(r"#[a-z-]+|data:,|(width|height): -?[\d.]+(%|px)|background: var\(--run\d\)")


def tags(page: str) -> list[str]:
    """List the tags of a page, with its scripts and styles left out: every ``<`` has to begin one."""
    for own in OWN:
        assert page.count(own) == 1
        page = page.replace(own, "")
    found = TAG.findall(page)
    assert len(found) == page.count("<")
    return found


def forms(found: list[str]) -> set[str]:
    """Leave the values of attributes out."""
    return {re.sub(r'"[^"]*"', "", tag) for tag in found}


WHOLE = tags(render_run(make_run(layers=2, perplexity={"text": FIGURES})))
KNOWN = [*WHOLE, *tags(render_comparison([RUN, make_run("b", layers=3)]))]
KNOWN += tags(render_run(make_run(tasks=False, layers=20, warnings=[], perplexity={})))
FORMS, SCRIPTS = forms(KNOWN), [tag for tag in WHOLE if tag.startswith("<script")]
LINKS = {value for tag in KNOWN for value in LINK.findall(tag)}


def examine(page: str) -> None:
    """Check that a page has no tag, attribute, link or style but the templates' own, and that its data are data."""
    found = tags(page)
    assert not forms(found) - FORMS
    assert [tag for tag in found if tag.startswith("<script")] == SCRIPTS
    assert not [
        value for tag in found for value in LINK.findall(tag) if value not in LINKS and not HARMLESS.fullmatch(value)
    ]
    assert isinstance(json.loads(DATA.findall(page)[0]), dict)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for name, content in FILES.items():
        (folder / name).write_text(json.dumps(content))
    write_recipe(folder)
    return folder


def report(folder: Path, name: str, content: str | bytes, render: Callable[[RunDocument], str] = render_run) -> None:
    """Report a run one of whose files is something else."""
    with put_back(folder / name, content):
        document = read(lambda: RunDocument.of_folder(folder), str(folder / name))
    if document is not None:
        examine(render(document))


@pytest.mark.parametrize("name", FILES)
def test_a_run_s_file_that_was_changed(run, name):
    @cases(160)
    @given(tampered(FILES[name], MARKUP | VALUES))
    def check(tree):
        report(run, name, json.dumps(tree))

    check()


@pytest.mark.parametrize("name", FILES)
def test_a_comparison_with_a_run_whose_file_was_changed(run, name):
    @cases(30)
    @given(tampered(FILES[name], MARKUP | VALUES))
    def check(tree):
        report(run, name, json.dumps(tree), lambda document: render_comparison([document, RUN]))

    check()


LINES = st.lists(
    st.sampled_from([*recipe_text().splitlines(), "model: {path: <b>}", "a: [1, {b: 2}]", "? x", "&a b"]) | MARKUP
)


@cases(60)
@given(LINES.map("\n".join) | VALUES.map(json.dumps) | st.binary(max_size=40), st.booleans())
def test_a_recipe_that_was_changed(run, content, compared):
    report(run, "recipe.yaml", content, (lambda found: render_comparison([found, RUN])) if compared else render_run)


@cases(100)
@given(st.sampled_from(sorted(FILES)), DAMAGE)
def test_bytes_that_were_changed(run, name, damage):
    report(run, name, damaged((run / name).read_bytes(), damage))


@pytest.mark.parametrize("name", [*FILES, "recipe.yaml"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[" * 100_000, b"[]", b"null", b'{"a": ' * 50 + b"1" + b"}" * 50, b"&a [*a, *a]", b"\0", b"{}"],
    ids=range(9),
)
def test_a_run_s_file_that_is_something_else(run, name, content):
    report(run, name, content)


@pytest.mark.parametrize("name", FILES)
def test_figures_of_a_run_whose_file_was_changed(run, name):
    """Each draws several pictures, which takes a fifth of a second."""

    @cases(5)
    @given(tampered(FILES[name], MARKUP | VALUES))
    def check(tree):
        with put_back(run / name, json.dumps(tree)):
            document = read(lambda: RunDocument.of_folder(run), str(run / name))
        if document is not None:
            draw_figures([document], ["svg"])
            draw_figures([document, RUN], ["svg"])

    check()


@pytest.mark.parametrize("name", ["$\\foo$", "<script>alert(1)</script>"])
def test_names_are_drawn_as_they_are(name, recwarn):
    """Beside what is shown a dollar sign begins no formula, and a tag no script."""
    document = make_run(name, layers=2)
    object.__setattr__(document.record, "model", name)
    document.result["perplexity"] = {name: {"dense": 4.0, "pruned": 5.0}}
    draw_figures([document], ["svg"])
    draw_figures([document, make_run("b", layers=2)], ["svg"])
    examine(render_run(document))
