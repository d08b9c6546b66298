"""The presets: shipped recipes for any model. Which one a recipe is, and what a better one would cost.

A preset's settings stand in its recipe (``recipes/best.yaml``) and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flapkit.pruning.components import TrainedSearcher, TrialSearcher
from flapkit.recipe.files import read_settings, shipped_recipes
from flapkit.recipe.load import LoadedRecipe, load_recipe
from flapkit.recipe.schema import ComponentSpec
from flapkit.registry import COMPENSATOR, METRIC, SEARCHER, ComponentKind
from flapkit.run.budget import open_budget
from flapkit.run.dtypes import DTypes
from flapkit.run.estimate import Estimate, empty_model, estimate_needs
from flapkit.run.executors import check_execution
from flapkit.run.target import Target
from flapkit.system.errors import RecipeError
from flapkit.system.sizes import counted

PRESETS = ("flap", "fast", "balanced", "best")
"""Names of the presets' recipes, from the cheapest to the best."""

METHOD = ("metric", "searcher", "compensator", "calibration.sequential")
"""The keys that make a preset; text, budget and model are the user's."""


@dataclass(frozen=True, slots=True)
class Better:
    """A preset that gives better models than a recipe.

    Args:
        name: its name.
        settings: the keys in which it differs from the recipe -> its values, as its file has them.
        needs: what the recipe would need with them; None if it cannot run so.
        search: what its search adds to the calibration, in words; empty for nothing.
        obstacle: why the recipe cannot run so; empty if it can.
    """

    name: str
    settings: Mapping[str, Any]
    needs: Estimate | None = None
    search: str = ""
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class Nearest:
    """The preset whose method is nearest to a recipe's.

    Args:
        name: its name.
        differs: the keys in which the two differ; none if the recipe is the preset.
    """

    name: str
    differs: Sequence[str]


def find_nearest(recipe: LoadedRecipe) -> Nearest:
    """Find the preset that a recipe is, or is nearest to; of several, the cheapest."""
    presets = {name: _load(name) for name in PRESETS}
    name = min(presets, key=lambda name: sum(_distances(recipe, presets[name]).values()))
    return Nearest(name, [key for key, distance in _distances(recipe, presets[name]).items() if distance])


def find_better(
    recipe: LoadedRecipe, nearest: Nearest, target: Target, dtypes: DTypes, processes: int = 1
) -> list[Better]:
    """Estimate what a recipe would need with the method of each preset that is better than the nearest one.

    Components of others' plugins stay: whoever tries them does not want them replaced.
    """
    found: list[Better] = []
    for name in PRESETS[PRESETS.index(nearest.name) + 1 :]:
        better = _better(recipe, name, target, dtypes, processes)
        if better.settings and better.settings not in [known.settings for known in found]:
            found.append(better)
    return found


def with_method(recipe: LoadedRecipe, preset: LoadedRecipe, keep: Collection[str] = ()) -> LoadedRecipe:
    """Return a recipe with the method of a preset, on its own text and budget; a training stays.

    Args:
        recipe: the recipe.
        preset: the preset.
        keep: keys of components that stay.
    """
    calibration = recipe.recipe.calibration.model_copy(update={"sequential": preset.recipe.calibration.sequential})
    trained = [named for named in recipe.named_compensators if named[0].recovery() is not None]
    repairing = [named for named in recipe.named_compensators if named[0].recovery() is None]
    repairs = repairing if "compensator" in keep else preset.named_compensators
    repaired = recipe.with_compensators([*repairs, *trained])
    scoring, searching = (recipe if key in keep else preset for key in ("metric", "searcher"))
    changed = {
        "metric": scoring.recipe.metric,
        "searcher": searching.recipe.searcher,
        "calibration": calibration,
    }
    settings = repaired.recipe.model_copy(update=changed)
    return replace(repaired, recipe=settings, metric=scoring.metric, searcher=searching.searcher)


def _of_others(recipe: LoadedRecipe) -> set[str]:
    """Return the keys of a recipe's method whose components are not flapkit's own."""
    used: list[tuple[ComponentKind[Any], str]] = [
        (METRIC, recipe.recipe.metric.name),
        (SEARCHER, recipe.recipe.searcher.name),
    ]
    used += [(COMPENSATOR, spec.name) for component, spec in recipe.named_compensators if component.corrects]
    return {kind.name for kind, name in used if not recipe.registry.origin(kind, name).startswith("flapkit ")}


def _load(name: str) -> LoadedRecipe:
    return load_recipe(shipped_recipes()[name])


def _better(recipe: LoadedRecipe, name: str, target: Target, dtypes: DTypes, processes: int) -> Better:
    preset = _load(name)
    kept = _of_others(recipe)
    changed = with_method(recipe, preset, kept)
    written = read_settings(shipped_recipes()[name])
    values = {**written, "calibration.sequential": preset.recipe.calibration.sequential}
    settings = {
        key: values[key] for key, distance in _distances(recipe, preset).items() if distance and key not in kept
    }
    try:
        check_execution(changed, target)
    except RecipeError as error:
        return Better(name, settings, obstacle=str(error).removeprefix(f"{recipe.path}: "))
    # A new one each time: a training is attached to it.
    empty = empty_model(target, dtypes)
    budget = open_budget(recipe, target, empty.num_parameters(), dtypes.saved).budget
    return Better(
        name, settings, estimate_needs(changed, target, empty, budget, dtypes, processes), describe_search(changed)
    )


def describe_search(recipe: LoadedRecipe) -> str:
    """Say what a recipe's search runs beside the calibration; nothing for searchers that rank."""
    searcher = recipe.searcher
    if isinstance(searcher, TrainedSearcher):
        training = searcher.training
        return f"{counted(training.steps, 'training step')} of {counted(training.batch_size, 'window')}"
    if isinstance(searcher, TrialSearcher):
        return "trials" if searcher.expected_trials is None else counted(searcher.expected_trials, "trial")
    return ""


def _distances(recipe: LoadedRecipe, preset: LoadedRecipe) -> dict[str, int]:
    """Return how far a recipe's method is from a preset's at each key: 0 the same, 1 other options, 2 another."""
    mine, its = _method(recipe), _method(preset)
    return {key: _distance(mine[key], its[key]) for key in METHOD}


def _method(recipe: LoadedRecipe) -> dict[str, Any]:
    settings = recipe.recipe
    repair = next((spec for component, spec in recipe.named_compensators if component.corrects), None)
    return dict(zip(METHOD, (settings.metric, settings.searcher, repair, settings.calibration.sequential), strict=True))


def _distance(mine: Any, its: Any) -> int:
    if mine == its:
        return 0
    named = isinstance(mine, ComponentSpec) and isinstance(its, ComponentSpec) and mine.name == its.name
    return 1 if named else 2
