"""The only edits of weights: slice units away, or mask them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flapkit.model.classes import describe_
from flapkit.model.plan import PruningPlan
from flapkit.model.resize import add_bias_, replace_, settle_
from flapkit.model.site import Site, groups
from flapkit.model.soundness import ADVICE, check_plain
from flapkit.system.errors import ModelError

M = TypeVar("M", bound=nn.Module)


def check_sites(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise ``ModelError`` unless every consumer and coupled parameter of the sites is there, plain, large and free.

    Plain is a tensor of floating-point numbers: no quantised one.
    Free is a parameter that no other name shares: what is tied across layers, or to an embedding, would be cut twice.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, param in params.items():
        names.setdefault(id(param), []).append(name)
    for site in sites:
        needed = [(site.weight, site.dim, site.channels)]
        needed += [(c.param, c.dim, c.start(site.units - 1) + c.per_unit) for c in site.couplings]
        for name, dim, length in needed:
            if name not in params:
                raise ModelError(f"{site.name}: the adapter names {name}, which {_lacking(model, name)}")
            check_plain(name, params[name])
            if params[name].shape[dim] < length:
                raise ModelError(
                    f"{site.name}: the adapter expects {length} entries in dimension {dim} of {name}, "
                    f"which has the shape {list(params[name].shape)}"
                )
            if len(shared := names[id(params[name])]) > 1:
                raise ModelError(f"{site.name}: {' and '.join(shared)} are one tensor; a shared one cannot be pruned")


def _lacking(model: nn.Module, name: str) -> str:
    """Say what lacks a parameter; a quantised linear often keeps its weight under other names."""
    path = name.rpartition(".")[0]
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return f"this {type(model).__name__} has not"
    held = [each for each, _ in itertools.chain(owner.named_buffers(), owner.named_parameters())]
    has = f"its {type(owner).__name__} has not" + (f": it holds {', '.join(held)}" if held else "")
    return f"{has}; is it quantised? {ADVICE}" if any("weight" in each for each in held) else has


def consumer_of(model: nn.Module, site: Site) -> nn.Module:
    """Return the module whose input channels a site prunes: a linear, or the module that holds all experts."""
    if site.expert is not None:
        return model.get_submodule(site.path)
    consumer = model.get_submodule(site.consumer)
    if not isinstance(consumer, (nn.Linear, Conv1D)):
        raise ModelError(f"{site.name}: the consumer {site.consumer} is a {type(consumer).__name__}, not a linear")
    return consumer


def weight_of(model: nn.Module, site: Site) -> Tensor:
    """Return the weight of a site's consumer, [out_features, channels]."""
    weight: Tensor = model.get_parameter(site.weight)
    if site.expert is None:
        return weight if site.dim == 1 else weight.T
    return weight[site.expert] if site.dim == 2 else weight[site.expert].T


def bias_of(model: nn.Module, site: Site) -> Tensor | None:
    """Return the bias of a site's consumer, [out_features], if it has one."""
    if not _has(model, site.bias):
        return None
    bias = model.get_parameter(site.bias)
    return bias if site.expert is None else bias[site.expert]


def share(model: M, sites: Sequence[Site], own: Sequence[str] = ()) -> M:
    """Copy a model but for its weights: slicing the copy leaves the original as it is, and takes little memory.

    Training the copy, or masking it, would change the original too.

    Args:
        model: the dense model.
        sites: its sites; of what slicing writes in place, the consumers' biases, the copy gets its own.
        own: names of the sites of whose consumers' weights the copy gets its own as well, so that they can be masked.
    """
    written = {site.bias for site in sites} | {site.weight for site in sites if site.name in own}
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return copy.deepcopy(model, {id(tensor): tensor for name, tensor in named if name not in written})


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
    for together in groups(sites):
        first, removed = together[0], {site.name: plan.removed_units(site) for site in together}
        # What keeps all its units settles as well: forward cannot read a common count from the configuration any more.
        _settle(model, first, plan.keep[first.name])
        if not removed[first.name]:
            continue
        channels = [site.channels_of(plan.keep[site.name]) for site in together]
        _keep(model, first.weight, first.dim, channels, stacked=first.expert is not None)
        _correct(model, together, corrections or {})
        for (name, dim), gone in _coupled(first, removed[first.name]).items():
            length = model.get_parameter(name).shape[dim]
            indices = [_without(length, gone)]
            if first.expert is not None:
                indices = [_without(length, _coupled(site, removed[site.name])[name, dim]) for site in together]
            _keep(model, name, dim, indices, stacked=first.expert is not None)


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
    for together in groups(sites):
        for site in together:
            removed = plan.removed_units(site)
            correction = (corrections or {}).get(site.name, Correction())
            weight = weight_of(model, site)
            if removed and correction.weight is not None:
                weight[:, site.channels_of(plan.keep[site.name])] = correction.weight.to(weight)
            weight[:, site.channels_of(removed)] = 0
        _add_biases(model, together, corrections or {})


def _correct(model: nn.Module, together: Sequence[Site], corrections: Mapping[str, Correction]) -> None:
    """Write the corrected weights of sites that are sliced already, and add the biases."""
    for site in together:
        correction = corrections.get(site.name, Correction())
        if correction.weight is not None:
            weight = weight_of(model, site)
            weight.copy_(correction.weight)
    _add_biases(model, together, corrections)


def _add_biases(model: nn.Module, together: Sequence[Site], corrections: Mapping[str, Correction]) -> None:
    biases = {site.name: corrections[site.name].bias for site in together if site.name in corrections}
    for site in together:
        bias = biases.get(site.name)
        if bias is None:
            continue
        if not _has(model, site.bias):
            _make_bias(model, site)
        old = model.get_parameter(site.bias)
        part = old if site.expert is None else old[site.expert]
        part.copy_(part.to(bias.dtype) + bias.to(part.device))


def _has(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf, None) is not None


def _make_bias(model: nn.Module, site: Site) -> None:
    if site.block is not None:
        add_bias_(model.get_submodule(site.path), site.block.data)
        return
    consumer, weight = model.get_submodule(site.consumer), weight_of(model, site)
    consumer.bias = nn.Parameter(weight.new_zeros(site.out_features), requires_grad=weight.requires_grad)


def _coupled(site: Site, removed: Sequence[int]) -> dict[tuple[str, int], list[int]]:
    """Gather the indices that go from each coupled parameter, which may have several parts."""
    indices: dict[tuple[str, int], list[int]] = {}
    for coupling in site.couplings:
        indices.setdefault((coupling.param, coupling.dim), []).extend(coupling.indices_of(removed))
    return indices


def _without(length: int, removed: Iterable[int]) -> list[int]:
    gone = set(removed)
    return [index for index in range(length) if index not in gone]


def _keep(model: nn.Module, name: str, dim: int, indices: Sequence[Sequence[int]], *, stacked: bool) -> None:
    """Keep some indices of one dimension, in a stack those of each expert; the result shares no memory with the old."""
    tensor = model.get_parameter(name).detach()
    kept = [torch.tensor(each, device=tensor.device) for each in indices]
    if stacked:
        experts = [expert.index_select(dim - 1, each) for expert, each in zip(tensor, kept, strict=True)]
        replace_(model, name, torch.stack(experts))
    else:
        replace_(model, name, tensor.index_select(dim, kept[0]))


def _settle(model: nn.Module, site: Site, keep: Sequence[int]) -> None:
    """Let what is no tensor follow the cut."""
    if site.block is None:
        return
    module, block, sizes = model.get_submodule(site.path), site.block, site.sizes(len(keep))
    heads = None
    if block.arguments or block.outputs:
        before = getattr(module, "kept_heads", range(site.heads))
        heads = [before[head] for head in site.heads_of(keep)]
    dense = {"H": site.heads, "K": site.kv_heads}
    settle_(module, block.data, block.counts(sizes), block.readings(sizes), dense, heads)


@dataclass(frozen=True, slots=True)
class Correction:
    """What a compensator does to a consumer.

    Args:
        weight: the new weight [out_features, kept channels], or None to keep the old columns.
        bias: what is added to the output [out_features], or None for nothing.
        note: what is worth knowing about this site, in a short sentence; it is logged and goes into the output.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    note: str | None = None


def carry_out_(
    model: PreTrainedModel, sites: Sequence[Site], plan: PruningPlan, corrections: Mapping[str, Correction]
) -> None:
    """Slice the model and give it the configuration of what it has become, in place.

    Args:
        model: the dense model.
        sites: its sites.
        plan: the units to keep.
        corrections: site name -> what a compensator does to the consumer.
    """
    slice_(model, sites, plan, corrections)
    describe_(model, sites)
