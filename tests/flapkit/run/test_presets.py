"""Which preset a recipe is, and what a better one would cost."""

from __future__ import annotations

import pytest
import torch
from conftest import write_recipe

from flapkit.recipe.files import find_recipe
from flapkit.recipe.load import load_recipe
from flapkit.run.check import check
from flapkit.run.dtypes import choose_dtypes
from flapkit.run.presets import PRESETS, find_better, find_nearest, with_method
from flapkit.run.target import find_target


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_itself_whatever_its_model_text_and_budget(name):
    recipe = load_recipe(
        find_recipe(name), ["model.path=builtin:tiny-llama", "calibration.samples=9", "budget.ratio=0.4"]
    )
    assert (find_nearest(recipe).name, find_nearest(recipe).differs) == (name, [])


@pytest.mark.parametrize("name", PRESETS)
def test_the_method_of_a_preset_makes_any_recipe_that_preset(home, name):
    """A training stays."""
    recipe = load_recipe(write_recipe(home, metric="random", compensator=["none", {"name": "lora", "rank": 2}]))
    changed = with_method(recipe, load_recipe(find_recipe(name)))
    assert (find_nearest(changed).name, find_nearest(changed).differs) == (name, [])
    assert changed.recipe.compensator[-1].name == changed.compensators[-1].name == "lora"
    assert changed.recipe.calibration.samples == recipe.recipe.calibration.samples


def test_the_nearest_preset_and_its_differences(home):
    recipe = load_recipe(write_recipe(home, searcher={"name": "ul_mm", "min_units": 2}, compensator="least_squares"))
    assert (find_nearest(recipe).name, find_nearest(recipe).differs) == ("fast", ["searcher"])


def test_better_presets_are_estimated_for_this_recipe(home):
    outcome = check(load_recipe(write_recipe(home)))
    assert outcome.preset.name == "flap"
    assert [better.name for better in outcome.better] == ["fast", "balanced", "best"]
    fast, balanced, best = outcome.better
    assert fast.settings == {"searcher": "ul_mm", "compensator": "least_squares"}
    assert balanced.settings == {**fast.settings, "calibration.sequential": True}
    assert outcome.needs.passes <= fast.needs.passes < balanced.needs.passes
    assert "training steps" in best.search
    there = check(load_recipe(write_recipe(home, **fast.settings), ["calibration.sequential=true"]))
    assert (there.preset.name, there.preset.differs) == ("balanced", [])
    assert (there.needs.passes, there.needs.flops) == (balanced.needs.passes, balanced.needs.flops)


def test_what_cannot_run_layer_by_layer_says_so(home):
    outcome = check(load_recipe(write_recipe(home, execution="layerwise")))
    assert [better.needs is None for better in outcome.better] == [False, False, True]
    assert "the whole model" in outcome.better[-1].obstacle


def test_the_command_shows_them(command, recipe):
    code, out, _ = command("check", recipe)
    assert code == 0
    assert "better: best" in out
    assert "--set compensator=least_squares --set calibration.sequential=true" in out


PLUGIN = """
from dataclasses import dataclass
import flapkit
from flapkit.interfaces import ImportanceMetric

@dataclass(frozen=True)
class Mine(ImportanceMetric):
    name = "mine"

    def score(self, site, stats, weight):
        return weight.abs().sum(0).view(site.units, -1)

@flapkit.hookimpl
def flapkit_metrics():
    return [Mine]
"""


def test_a_metric_of_ones_own_is_not_replaced(home):
    (home / "mine.py").write_text(PLUGIN)
    recipe = load_recipe(write_recipe(home, metric="mine", plugins=["mine.py"]))
    target = find_target(recipe)
    dtypes = choose_dtypes(recipe.recipe.model, target.config, torch.device("cpu"))
    better = find_better(recipe, find_nearest(recipe), target, dtypes)
    assert [found.name for found in better] == ["fast", "balanced", "best"]
    assert not any("metric" in found.settings for found in better)
    assert all(found.settings["compensator"] == "least_squares" for found in better)
