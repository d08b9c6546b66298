"""The only edits of weights: slice units away, or mask them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flapkit.errors import ModelError
from flapkit.interfaces import Correction
from flapkit.plan import PruningPlan
from flapkit.sites import Site


def check_sites(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise ``ModelError`` unless every consumer and coupled parameter of the sites has the size they say."""
    params = dict(model.named_parameters())
    for site in sites:
        expected = {f"{site.consumer}.weight": (1, site.channels)}
        for coupling in site.couplings:
            _, length = expected.get(coupling.param, (coupling.dim, 0))
            expected[coupling.param] = (coupling.dim, length + site.units * coupling.per_unit)
        for name, (dim, length) in expected.items():
            if name not in params:
                raise ModelError(f"{site.name}: the adapter names {name}, which this {type(model).__name__} has not")
            if params[name].shape[dim] < length:
                raise ModelError(
                    f"{site.name}: the adapter expects {length} entries in dimension {dim} of {name}, "
                    f"which has the shape {list(params[name].shape)}"
                )


def consumer_of(model: nn.Module, site: Site) -> nn.Linear:
    """Return the linear whose input channels a site prunes."""
    consumer = model.get_submodule(site.consumer)
    if not isinstance(consumer, nn.Linear):
        raise ModelError(f"{site.name}: the consumer {site.consumer} is a {type(consumer).__name__}, not a linear")
    return consumer


def weight_of(model: nn.Module, site: Site) -> Tensor:
    """Return the weight of a site's consumer, [out_features, channels]."""
    return consumer_of(model, site).weight


@torch.no_grad()
def slice_(
    model: nn.Module, sites: Sequence[Site], plan: PruningPlan, corrections: Mapping[str, Correction] | None = None
) -> None:
    """Remove the units that a plan does not keep, in place: the tensors really shrink.

    Args:
        model: the dense model.
        sites: its sites.
        plan: the units to keep.
        corrections: site name -> what a compensator does to the consumer.
    """
    plan.check(sites)
    for site in sites:
        removed = plan.removed_units(site)
        if not removed:
            continue
        consumer = consumer_of(model, site)
        correction = (corrections or {}).get(site.name, Correction())
        weight = _keep(consumer.weight, 1, site.channels_of(removed))
        _replace(model, f"{site.consumer}.weight", weight if correction.weight is None else correction.weight)
        _add_bias(consumer, correction.bias)
        for (name, dim), indices in _coupled(site, removed).items():
            _replace(model, name, _keep(model.get_parameter(name), dim, indices))


@torch.no_grad()
def mask_(
    model: nn.Module, sites: Sequence[Site], plan: PruningPlan, corrections: Mapping[str, Correction] | None = None
) -> None:
    """Zero what ``slice_`` would remove, in place: the same function at the dense model's shapes.

    Args:
        model: the dense model.
        sites: its sites.
        plan: the units to keep.
        corrections: site name -> what a compensator does to the consumer.
    """
    plan.check(sites)
    for site in sites:
        removed = plan.removed_units(site)
        if not removed:
            continue
        consumer = consumer_of(model, site)
        correction = (corrections or {}).get(site.name, Correction())
        if correction.weight is not None:
            consumer.weight[:, site.channels_of(plan.keep[site.name])] = correction.weight.to(consumer.weight)
        consumer.weight[:, site.channels_of(removed)] = 0
        _add_bias(consumer, correction.bias)


def _coupled(site: Site, removed: Sequence[int]) -> dict[tuple[str, int], list[int]]:
    """Gather the indices that go from each coupled parameter, which may have several parts."""
    indices: dict[tuple[str, int], list[int]] = {}
    for coupling in site.couplings:
        gone = indices.setdefault((coupling.param, coupling.dim), [])
        for unit in removed:
            start = coupling.offset + unit * coupling.per_unit
            gone.extend(range(start, start + coupling.per_unit))
    return indices


def _keep(tensor: Tensor, dim: int, removed: Sequence[int]) -> Tensor:
    """Drop some indices of one dimension; the result shares no memory with ``tensor``."""
    kept = torch.ones(tensor.shape[dim], dtype=torch.bool)
    kept[list(removed)] = False
    return tensor.index_select(dim, kept.nonzero().squeeze(1).to(tensor.device))


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in a parameter's place, in its dtype and on its device, and let a linear know its new size."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = model.get_parameter(name)
    setattr(module, attribute, nn.Parameter(value.to(old).contiguous(), requires_grad=old.requires_grad))
    if isinstance(module, nn.Linear) and attribute == "weight":
        module.out_features, module.in_features = module.weight.shape


def _add_bias(consumer: nn.Linear, bias: Tensor | None) -> None:
    if bias is None:
        return
    old = consumer.bias
    if old is not None:
        bias = old.to(bias) + bias.to(old.device)
    requires_grad = consumer.weight.requires_grad
    consumer.bias = nn.Parameter(bias.to(consumer.weight), requires_grad=requires_grad)
