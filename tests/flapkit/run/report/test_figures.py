"""The pictures: one for each thing that was measured, and the same bytes each time."""

from __future__ import annotations

import pytest
from runs import TRAINING, TRIALS, make_run

from flapkit.run.report.figures import draw_figures, draw_structure

BEGINNINGS = {"png": b"\x89PNG", "svg": b"<?xml"}


@pytest.mark.parametrize("form", BEGINNINGS)
def test_a_run_and_a_comparison(form):
    run, other = make_run("a"), make_run("b", 0.5)
    single, several = draw_figures([run], [form]), draw_figures([run, other], [form])
    assert set(single) == {f"{name}.{form}" for name in ("structure", "scores", "errors", "zero-shot")}
    assert set(several) == {f"{name}.{form}" for name in ("structure", "errors", "zero-shot", "tradeoff")}
    assert all(content.startswith(BEGINNINGS[form]) for content in (*single.values(), *several.values()))


def test_the_same_run_gives_the_same_svg():
    assert draw_figures([make_run()], ["svg"]) == draw_figures([make_run()], ["svg"])


@pytest.mark.parametrize("search", [TRIALS, TRAINING])
def test_the_course_of_a_search(search):
    assert draw_figures([make_run(search=search)], ["svg"])["search.svg"].startswith(BEGINNINGS["svg"])


def test_what_was_not_measured_is_not_drawn():
    assert "search.svg" not in draw_figures([make_run()], ["svg"])
    assert "zero-shot.svg" not in draw_figures([make_run(tasks=False)], ["svg"])
    assert draw_figures([make_run()], []) == {}


def test_the_structure_of_a_large_model():
    assert draw_structure(make_run(layers=40)).startswith(BEGINNINGS["png"])
