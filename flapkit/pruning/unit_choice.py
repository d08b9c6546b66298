"""Choose the attention unit that ``unit: auto`` leaves open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flapkit.model.adapter import ArchitectureAdapter, FamilyAdapter
from flapkit.model.site import Site
from flapkit.pruning.rounding import can_share
from flapkit.system.sizes import counted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Obstacle = Callable[[Sequence[Site]], str]
"""Says why single query heads cannot be the units, or returns an empty text."""


@dataclass(frozen=True, slots=True)
class UnitChoice:
    """An adapter whose attention unit is settled.

    Args:
        adapter: the adapter, with the unit ``kv_group`` or ``query_head``.
        sites: the model's sites.
        reason: the unit, and why it was chosen; empty where the adapter left nothing open.
    """

    adapter: ArchitectureAdapter
    sites: tuple[Site, ...]
    reason: str = ""


def choose_unit(adapter: ArchitectureAdapter, config: PreTrainedConfig, obstacle: Obstacle) -> UnitChoice:
    """Settle an adapter's attention unit: query heads, unless the family has none or something is in their way.

    Args:
        adapter: the adapter; one that does not leave its unit open stays as it is.
        config: the model's configuration.
        obstacle: says what is in the way of single query heads, of which it gets the sites.

    Raises:
        ModelError: the declaration does not fit the model.
    """
    sites = adapter.sites(config)
    if not isinstance(adapter, FamilyAdapter) or adapter.unit != "auto":
        return UnitChoice(adapter, sites)
    groups = replace(adapter, unit="kv_group")
    of_groups = groups.sites(config)
    reason = _why_alike(of_groups, config.model_type) if sites == of_groups else obstacle(sites)
    if reason:
        return UnitChoice(groups, of_groups, f"kv_group: {reason}")
    single = replace(adapter, unit="query_head")
    return UnitChoice(single, sites, "query_head: the family, the budget and the exports allow it")


def budget_obstacle(sites: Sequence[Site], kind: str, devices: int) -> str:
    """Say why a budget needs whole key/value heads for units, or return an empty text.

    Args:
        sites: the sites of a model whose units are single query heads.
        kind: what the budget counts: its key in a recipe.
        devices: how many devices share every layer.
    """
    if kind == "kv_cache":
        return "budget.kv_cache: removing query heads does not shorten the cache, which holds key/value heads"
    if kind == "latency":
        return "budget.latency: `flapkit bench --blocks` times key/value heads with their query heads"
    for site in sites:
        sizes = range(site.runs, site.units + 1, site.runs)
        if site.runs > 1 and not any(can_share(site, units, devices) for units in sizes):
            return (
                f"budget.tensor_parallel: {devices} devices cannot share the {counted(site.kv_heads, 'key/value head')}"
            )
    return ""


def _why_alike(sites: Sequence[Site], model_type: str) -> str:
    """Say why both units give the same sites."""
    if any(site.heads > site.units for site in sites):
        return f"models of type {model_type!r} cannot lose single query heads"
    return "each unit is a single query head in any case"
