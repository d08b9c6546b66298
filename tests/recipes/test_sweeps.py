"""The sweeps that come with flapkit."""

from __future__ import annotations

import itertools

import pytest

from flapkit.recipe.files import find_sweep, shipped_sweeps
from flapkit.run.presets import Nearest, find_nearest
from flapkit.run.sweep.load import load_sweep, select

SWEEPS = shipped_sweeps()


def test_they_are_all_there():
    assert set(SWEEPS) >= {"ablation", "calibration", "ratio", "smollm2-ablation", "smollm2-compensation"}


@pytest.mark.parametrize("name", SWEEPS)
def test_it_loads_and_says_what_it_does(name):
    sweep = load_sweep(find_sweep(name))
    first = SWEEPS[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) < 120
    assert sweep.file.output == f"runs/sweeps/{name}"
    model = "models/smollm2-135m" if name.startswith(("smollm2", "scoreboard")) else "builtin:tiny-llama"
    assert {point.recipe.recipe.model.path for point in sweep.points} == {model}
    assert len({point.label for point in sweep.points}) == len(sweep.points) >= 12


@pytest.mark.parametrize("name", SWEEPS)
def test_it_can_be_pointed_at_another_model(name):
    sweep = load_sweep(SWEEPS[name], ["model.path=./mine", "calibration.dataset=mine.txt", "calibration.split=null"])
    assert {point.recipe.recipe.model.path for point in sweep.points} == {"./mine"}
    assert {point.recipe.recipe.calibration.dataset for point in sweep.points} == {"mine.txt"}


def test_the_scoreboard_has_the_presets():
    """By the same settings, so that what is measured is what users get."""
    sweep = load_sweep(SWEEPS["scoreboard"])
    assert {point.recipe.recipe.budget.ratio for point in sweep.points} == {0.125, 0.2, 0.3, 0.375, 0.5}
    same = {"FLAP": "flap", "least squares": "fast", "sequential least squares": "balanced", "gates": "best"}
    for method, preset in same.items():
        (point,) = select(sweep, ["budget.ratio=0.5", f"method={method}"]).points
        assert find_nearest(point.recipe) == Nearest(preset, [])


def test_the_ablation_holds_the_papers_metrics_and_structures():
    points = load_sweep(SWEEPS["ablation"]).points
    found = {(point.recipe.metric.name, point.recipe.searcher.name) for point in points}
    assert found >= set(itertools.product(("wifv", "ifv", "wifn"), ("al_am", "al_mm", "ul_mm", "ul_um")))
    assert "random" in {metric for metric, _ in found}
