"""What a pruned model keeps of the dense one, over all its prunings: the model carries it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flapkit.model.plan import PruningPlan
from flapkit.model.registration import PREFIX
from flapkit.model.site import Site
from flapkit.system.errors import ModelError
from flapkit.system.sizes import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTRIBUTE = "flapkit_plan"
"""The model's attribute that holds its plan."""

EXPERT = re.compile(r"layers\.(?P<layer>\d+)\.[^.]+\.(?P<expert>\d+)")
"""The name of an expert's site."""


def plan_of(model: PreTrainedModel) -> PruningPlan | None:
    """Return the units that a pruned model keeps, as indices into the dense model.

    Returns:
        None where the model does not carry them: it is dense, or was loaded without its ``plan.json``.
    """
    plan: PruningPlan | None = getattr(model, ATTRIBUTE, None)
    return plan


def set_plan_(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Let a model carry a plan.

    Args:
        model: a pruned model.
        plan: the units that it keeps, as indices into the dense model.
    """
    vars(model)[ATTRIBUTE] = plan


def add_plan_(model: PreTrainedModel, sites: Sequence[Site], plan: PruningPlan) -> None:
    """Add a plan to those that a model was pruned by; called before the model gets its pruned configuration.

    A model that was pruned before, and does not carry that plan, gets none.

    Args:
        model: the model that is pruned.
        sites: its sites before.
        plan: the units that it keeps of them.

    Raises:
        ModelError: the plan that the model carries does not fit its sites.
    """
    earlier = plan_of(model)
    if earlier is not None:
        set_plan_(model, compose(earlier, plan, sites))
    elif not model.config.model_type.startswith(PREFIX):
        set_plan_(model, plan)


def compose(earlier: PruningPlan, later: PruningPlan, sites: Sequence[Site]) -> PruningPlan:
    """Return the plan that does in one pruning what two do.

    The units of an attention are the dense model's KV heads with their query heads, as long as none of them lost single
    query heads; then they are its query heads. Experts are named by their index in the dense model; those that are
    removed whole are named by the mixture alone.

    Args:
        earlier: the plan of the first pruning.
        later: the plan of the second.
        sites: the sites of the model between the two.

    Raises:
        ModelError: the earlier plan does not fit the sites.
    """
    keep = dict(earlier.keep)
    for site in sites:
        name = site.name if site.expert is None else _name_in_dense(site, earlier)
        keep[name] = _compose(site, earlier.keep.get(name), later.keep[site.name])
    return PruningPlan({name: units for name, units in keep.items() if not is_removed(name, keep)})


def _name_in_dense(site: Site, earlier: PruningPlan) -> str:
    """Return the name that an expert's site has in the dense model, where whole experts were removed before it."""
    experts = earlier.keep.get(f"layers.{site.layer}.mixture")
    return site.name if experts is None else f"{site.group}.{experts[site.expert or 0]}"


def is_removed(name: str, keep: Mapping[str, Sequence[int]]) -> bool:
    """Tell whether a site is an expert that a plan removes whole."""
    matched = EXPERT.fullmatch(name)
    if not matched:
        return False
    experts = keep.get(f"layers.{matched['layer']}.mixture")
    return experts is not None and int(matched["expert"]) not in experts


def _compose(site: Site, earlier: Sequence[int] | None, later: Sequence[int]) -> tuple[int, ...]:
    """Compose the units that two plans keep of one site."""
    if earlier is None:
        return tuple(later)
    if len(earlier) == site.units:
        return tuple(earlier[unit] for unit in later)
    if len(earlier) not in (site.heads, site.kv_heads):
        raise ModelError(
            f"{site.name}: the plan of the first pruning keeps {counted(len(earlier), 'unit')}, but the model "
            f"has {site.units}; one of the two was changed"
        )
    if len(later) == site.units:
        return tuple(earlier)
    if len(earlier) == site.heads:
        return tuple(earlier[head] for head in site.heads_of(later))
    group = site.heads // site.kv_heads
    return tuple(earlier[head // group] * group + head % group for head in later)
