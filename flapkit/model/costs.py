"""What a model and its units cost: parameters, bytes of weights, KV cache, parameters used for a token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flapkit.model.budget import Cost
from flapkit.model.precision import name_of
from flapkit.model.site import Site, groups
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUTED = "num_experts_per_tok"
"""The configuration's entry for the number of experts that a token goes to."""


def bytes_of(model: PreTrainedModel) -> int:
    """Return the bytes of a model's weights; tied weights count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def param_cost(model: PreTrainedModel, sites: Sequence[Site], total: int, *, biased: bool) -> Cost:
    """Count parameters.

    Args:
        model: the dense model; it may be on the meta device.
        sites: its sites.
        total: number of its parameters.
        biased: corrections add biases to the consumers that have none.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    corrected = [site for site in sites if biased and site.kind != "mixture"]
    added = {site.name: site.out_features for site in corrected if site.bias not in names}
    units, rest = {site.name: site.params_per_unit for site in sites}, {site.name: site.rest for site in sites}
    return Cost("params", total, units, added, rest=rest)


def weight_cost(params: Cost, dtype: torch.dtype) -> Cost:
    """Count the bytes of the weights.

    Args:
        params: the count of parameters.
        dtype: of all weights.
    """
    size = dtype.itemsize

    def scaled(costs: Mapping[str, int]) -> dict[str, int]:
        return {name: size * cost for name, cost in costs.items()}

    return Cost(
        "memory",
        size * params.total,
        scaled(params.units),
        scaled(params.added),
        detail=name_of(dtype),
        rest=scaled(params.rest),
    )


def cache_cost(sites: Sequence[Site], dtype: torch.dtype) -> Cost:
    """Count the bytes that a token takes in the KV cache, in all layers with attention that can be pruned.

    A unit counts where its key/value heads go with it: not where several query heads share one that stays, nor under
    latent attention.

    Args:
        sites: the model's sites.
        dtype: of the cache.
    """
    total, units = 0, dict[str, int]()
    for site in sites:
        if site.kind == "attention" and site.kv_heads and _caches_heads(site):
            head = 2 * (site.channels // site.heads) * dtype.itemsize
            total += site.kv_heads * head
            if site.units == site.kv_heads:
                units[site.name] = head
    return Cost("kv_cache", total, units, detail=name_of(dtype))


def _caches_heads(site: Site) -> bool:
    """Return whether the cache holds keys and values by head, as far as the declaration says."""
    return site.block is None or any("k" in layout for layout in site.block.parameters.values())


def active_cost(model: PreTrainedModel, sites: Sequence[Site], params: Cost) -> Cost | None:
    """Count the parameters that one token uses; None for a model without experts.

    A token goes to as many experts as before when whole experts are removed: only their part of the router counts.

    Args:
        model: the dense model; it may be on the meta device.
        sites: its sites.
        params: the count of parameters.

    Raises:
        ModelError: the configuration does not say how many experts a token goes to.
    """
    stacks = [_Stack.of(model, together) for together in groups(sites) if together[0].expert is not None]
    mixtures = [site for site in sites if site.kind == "mixture"]
    if not stacks and not mixtures:
        return None
    scale = math.lcm(*(stack.experts for stack in stacks))
    shares = {site.name: stack.share(scale) for stack in stacks for site in stack.sites}

    def scaled(costs: Mapping[str, int]) -> dict[str, int]:
        return {name: cost * shares.get(name, scale) for name, cost in costs.items()}

    total = scale * params.total - sum(stack.params * (scale - stack.share(scale)) for stack in stacks)
    units = scaled(params.units)
    for site in mixtures:
        router = _router_params(site)
        units[site.name] = scale * router
        if not site.nested:
            total -= scale * (site.units - _routed(model, site.units)) * (site.params_per_unit - router)
    return Cost("active_params", total, units, scaled(params.added), scale, rest=scaled(params.rest), routed=True)


def _router_params(site: Site) -> int:
    """Count the parameters of the router that go with one expert of a mixture."""
    path = f"{site.path}.{site.block.router}." if site.block else ""
    return sum(coupling.params_per_unit for coupling in site.couplings if coupling.param.startswith(path))


def _routed(model: PreTrainedModel, experts: int) -> int:
    """Read how many experts a token goes to.

    Raises:
        ModelError: the configuration does not say it.
    """
    routed = getattr(model.config.get_text_config(), ROUTED, None)
    if not isinstance(routed, int) or not 0 < routed <= experts:
        raise ModelError(
            f"budget.active_params: the configuration has no valid {ROUTED}, the number of experts that a token "
            "goes to; use budget.params"
        )
    return routed


@dataclass(frozen=True, slots=True)
class _Stack:
    """The experts of a layer.

    Args:
        sites: the experts.
        params: parameters of them all.
        routed: how many of them a token goes to.
    """

    sites: Sequence[Site]
    params: int
    routed: int

    @classmethod
    def of(cls, model: PreTrainedModel, together: Sequence[Site]) -> _Stack:
        routed = _routed(model, len(together))
        module = model.get_submodule(together[0].path)
        return cls(together, sum(parameter.numel() for parameter in module.parameters()), routed)

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.sites)

    def share(self, scale: int) -> int:
        """Return how many parts of ``scale`` of an expert a token uses, on average."""
        return scale * self.routed // self.experts
