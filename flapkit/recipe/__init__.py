"""Recipes: the YAML file that says what a run does."""

from __future__ import annotations

from flapkit.recipe.dump import dump_recipe
from flapkit.recipe.files import find_recipe, shipped_recipes
from flapkit.recipe.json_schema import recipe_schema
from flapkit.recipe.load import LoadedRecipe, load_recipe
from flapkit.recipe.schema import (
    BudgetSection,
    Calibration,
    ComponentSpec,
    Evaluate,
    Model,
    Perplexity,
    Recipe,
    ReportSection,
    Samples,
    TrainerSection,
    ZeroShot,
)

__all__ = [
    "BudgetSection",
    "Calibration",
    "ComponentSpec",
    "Evaluate",
    "LoadedRecipe",
    "Model",
    "Perplexity",
    "Recipe",
    "ReportSection",
    "Samples",
    "TrainerSection",
    "ZeroShot",
    "dump_recipe",
    "find_recipe",
    "load_recipe",
    "recipe_schema",
    "shipped_recipes",
]
