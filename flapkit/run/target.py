"""What a recipe prunes, from the model's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flapkit.checkpoint.export import biased_kinds, check_exports
from flapkit.checkpoint.formats import Prospect
from flapkit.checkpoint.load import check_language_model, check_unpickled, load_config
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.model.budget import prunable
from flapkit.model.registration import dense_type
from flapkit.model.site import Site
from flapkit.model.soundness import check_unquantised
from flapkit.pruning.algorithm import check_nested, check_scored, check_states
from flapkit.pruning.unit_choice import UnitChoice, budget_obstacle, choose_unit
from flapkit.recipe.load import LoadedRecipe
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Target:
    """What a recipe prunes, as far as the model's configuration shows it.

    Args:
        config: the dense model's configuration.
        adapter: describes the model.
        sites: the model's sites.
        why_unit: its attention unit and why it was chosen, where the recipe leaves that open (``unit: auto``).
    """

    config: PreTrainedConfig
    adapter: ArchitectureAdapter
    sites: tuple[Site, ...]
    why_unit: str = ""

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the model knows."""
        return int(self.config.get_text_config().vocab_size)


def find_target(recipe: LoadedRecipe) -> Target:
    """Read the model's configuration, and find its adapter and its sites.

    Raises:
        ModelError: the model is missing, has no adapter or a wrong declaration, or the pruned model could not be saved
            or exported.
    """
    model = recipe.recipe.model
    config = load_config(model.source, revision=model.revision)
    check_language_model(model.source, config)
    check_unquantised(model.source, config)
    check_unpickled(model.source)
    try:
        adapter = recipe.registry.resolve(recipe.adapter, config)
        chosen = _choose_unit(recipe, adapter, config)
        adapter, sites = chosen.adapter, chosen.sites
        adapter.check_declaration(config)
    except ModelError as error:
        raise ModelError(f"model {model.source}: {error}") from error
    if any(site.block is None for site in sites):
        raise ModelError(
            f"models pruned by adapter {adapter.name!r} cannot be saved: its sites have no declaration "
            "(flapkit.interfaces.Family), which the class that loads them needs"
        )
    if recipe.searcher.uses_scores:
        check_scored(recipe.method.metric, sites)
    check_nested(recipe.searcher, sites)
    check_states(recipe.method.statistics, sites)
    if recipe.exporters:
        check_exports(recipe.exporters, prospect(recipe, config, sites))
    return Target(config, adapter, sites, chosen.reason)


def _choose_unit(recipe: LoadedRecipe, adapter: ArchitectureAdapter, config: PreTrainedConfig) -> UnitChoice:
    """Settle the attention unit by what the family, the budget and the exports allow."""
    budget = recipe.recipe.budget

    def obstacle(sites: Sequence[Site]) -> str:
        if reason := budget_obstacle(sites, budget.kind, budget.tensor_parallel):
            return reason
        try:
            check_exports(recipe.exporters, prospect(recipe, config, tuple(sites)))
        except ModelError as error:
            return str(error)
        return ""

    try:
        return choose_unit(adapter, config, obstacle)
    except AttributeError as error:
        raise ModelError(
            f"adapter {adapter.name!r} does not fit models of type {config.model_type!r} "
            f"({error}); leave `adapter` out, or choose another"
        ) from error


def prospect(recipe: LoadedRecipe, config: PreTrainedConfig, sites: tuple[Site, ...]) -> Prospect:
    """Describe the pruned model, as far as the recipe determines it."""
    budget, biases = recipe.recipe.budget, biased_kinds(config, sites)
    if recipe.method.adds_bias:
        biases |= {site.kind for site in prunable(sites, budget.base)} - {"mixture"}
    return Prospect(
        dense_type(config.model_type),
        config,
        sites,
        recipe.searcher.uniform,
        biases,
        budget.multiple_of,
        may_remove=recipe.searcher.removes_blocks(prunable(sites, budget.base)),
    )
