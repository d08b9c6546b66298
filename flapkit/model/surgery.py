"""Edit a model's weights: slice units away, or mask them. No other module does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from flapkit.model.classes import set_pruned_config_
from flapkit.model.closed_experts import close_experts_
from flapkit.model.history import add_plan_
from flapkit.model.plan import PruningPlan
from flapkit.model.resize import add_bias_, is_linear, remove_, replace_, set_sizes_, tensor_of
from flapkit.model.site import Site, groups, renumbered
from flapkit.model.soundness import ADVICE, check_float_weight
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)


def check_sites(model: nn.Module, sites: Sequence[Site]) -> None:
    """Check the consumers and coupled parameters of the sites.

    Raises:
        ModelError: a parameter is missing, quantised, too small, or tied to another one (it would be sliced twice).
    """
    params = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    names: dict[int, list[str]] = {}
    for name, param in params.items():
        names.setdefault(id(param), []).append(name)
    for site in sites:
        needed = [(site.weight, site.dim, site.channels)]
        needed += [(c.param, c.dim, c.start(site.units - 1) + c.per_unit) for c in site.couplings]
        for name, dim, length in needed:
            if name not in params:
                raise ModelError(f"{site.name}: {_missing(model, name)}")
            check_float_weight(name, params[name])
            if params[name].shape[dim] < length:
                raise ModelError(
                    f"{site.name}: the adapter expects {length} entries in dimension {dim} of {name}, "
                    f"which has the shape {list(params[name].shape)}"
                )
            if len(shared := names[id(params[name])]) > 1:
                raise ModelError(f"{site.name}: {' and '.join(shared)} are tied; tied parameters cannot be pruned")


def _missing(model: nn.Module, name: str) -> str:
    """Describe what lacks a parameter; a quantised linear often stores its weight under other names."""
    path = name.rpartition(".")[0]
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return f"{type(model).__name__} has no parameter {name}, which the adapter declares"
    params = [param for param, _ in itertools.chain(owner.named_buffers(), owner.named_parameters())]
    text = f"{type(owner).__name__} has no parameter {name}, which the adapter declares"
    text += f"; it has {', '.join(params)}" if params else ""
    return f"{text}; is it quantised? {ADVICE}" if any("weight" in param for param in params) else text


def consumer_of(model: nn.Module, site: Site) -> nn.Module:
    """Return the module whose input channels a site prunes: a linear, or the module of all experts."""
    if site.stacked:
        return model.get_submodule(site.consumer.rpartition(".")[0])
    consumer = model.get_submodule(site.consumer)
    if not is_linear(consumer):
        raise ModelError(f"{site.name}: the consumer {site.consumer} is a {type(consumer).__name__}, not a Linear")
    return consumer


def weight_of(model: nn.Module, site: Site) -> Tensor:
    """Return the weight of a site's consumer, [out_features, channels]; of a mixture, a column for each expert."""
    weight: Tensor = model.get_parameter(site.weight)
    if site.kind == "mixture":
        return weight.flatten(1).T
    if site.expert is None:
        return weight if site.dim == 1 else weight.T
    return weight[site.expert] if site.dim == 2 else weight[site.expert].T


def bias_of(model: nn.Module, site: Site) -> Tensor | None:
    """Return the bias of a site's consumer, [out_features], or None; a mixture has none."""
    if site.kind == "mixture" or not _has(model, site.bias):
        return None
    bias = model.get_parameter(site.bias)
    return bias if site.expert is None else bias[site.expert]


def copy_sharing_weights(model: M, sites: Sequence[Site], own: Sequence[str] = ()) -> M:
    """Copy a model that shares its weights with the original, so that slicing the copy takes little memory.

    Slicing the copy does not change the original. Training or masking it would.

    Args:
        model: the dense model.
        sites: its sites; the copy has its own consumers' biases, which slicing writes in place.
        own: names of sites for which the copy has its own consumers' weights, so that they can be masked.
    """
    written = {site.bias for site in sites} | {site.weight for site in sites if site.name in own}
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return copy.deepcopy(model, {id(tensor): tensor for name, tensor in named if name not in written})


@torch.no_grad()
def slice_(
    model: nn.Module, sites: Sequence[Site], plan: PruningPlan, corrections: Mapping[str, Correction] | None = None
) -> None:
    """Remove the units that a plan does not keep, in place: the tensors shrink, and blocks without units go.

    Args:
        model: the dense model.
        sites: its sites.
        plan: the units to keep.
        corrections: site name -> the consumer's correction.
    """
    plan.check(sites)
    for together in groups(sites):
        # The stack of experts has lost those that are gone: a mixture comes before its experts.
        together = renumbered(together, plan.keep) or together
        first, removed = together[0], {site.name: plan.removed_units(site) for site in together}
        if not plan.keep[first.name]:
            assert first.block is not None
            _add_biases(model, together, corrections or {})
            remove_(model.get_submodule(first.layer_path), first.block.data)
            continue
        # Also for sites that keep all units: forward can no longer read one size for all layers from the configuration.
        _set_sizes(model, first, plan.keep[first.name])
        if not removed[first.name]:
            continue
        channels = [site.channels_of(plan.keep[site.name]) for site in together]
        _keep(model, first.weight, first.dim, channels, stacked=first.expert is not None)
        _correct(model, together, corrections or {})
        for (name, dim), removed_rows in _coupled(first, removed[first.name]).items():
            length = tensor_of(model, name).shape[dim]
            indices = [_without(length, removed_rows)]
            if first.expert is not None:
                indices = [_without(length, _coupled(site, removed[site.name])[name, dim]) for site in together]
            _keep(model, name, dim, indices, stacked=first.expert is not None)


@torch.no_grad()
def mask_(
    model: nn.Module, sites: Sequence[Site], plan: PruningPlan, corrections: Mapping[str, Correction] | None = None
) -> None:
    """Mask the units that ``slice_`` would remove, in place: the same function at the dense model's shapes.

    Channels are zeroed; whole experts are never chosen.

    Args:
        model: the dense model.
        sites: its sites.
        plan: the units to keep.
        corrections: site name -> the consumer's correction.
    """
    plan.check(sites)
    for together in groups(sites):
        for site in together:
            removed = plan.removed_units(site)
            if site.kind == "mixture":
                _close_(model, site, removed)
                continue
            correction = (corrections or {}).get(site.name, Correction())
            weight = weight_of(model, site)
            if removed and correction.weight is not None:
                weight[:, site.channels_of(plan.keep[site.name])] = correction.weight.to(weight)
            weight[:, site.channels_of(removed)] = 0
        _add_biases(model, together, corrections or {})


def _close_(model: nn.Module, site: Site, removed: Sequence[int]) -> None:
    """Mask experts of a mixture."""
    if not removed or site.block is None:
        return
    path = f"{site.path}.{site.block.router}"
    names = [coupling.param.removeprefix(f"{path}.") for coupling in site.couplings if coupling.param.startswith(path)]
    router = model.get_submodule(path)
    close_experts_(router, removed, [name for name in names if tensor_of(router, name).dim() == 1])


def _correct(model: nn.Module, together: Sequence[Site], corrections: Mapping[str, Correction]) -> None:
    """Write the corrected weights of sliced sites, and add the biases."""
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
        # First the device, then the type: not every device has float64.
        total = part.to(bias.device).to(bias.dtype) + bias
        part.copy_(total.to(part.dtype))


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
    """Return (parameter, dimension) -> the indices to remove, over all parts of a fused parameter."""
    indices: dict[tuple[str, int], list[int]] = {}
    for coupling in site.couplings:
        indices.setdefault((coupling.param, coupling.dim), []).extend(coupling.indices_of(removed))
    return indices


def _without(length: int, removed: Iterable[int]) -> list[int]:
    excluded = set(removed)
    return [index for index in range(length) if index not in excluded]


def _keep(model: nn.Module, name: str, dim: int, indices: Sequence[Sequence[int]], *, stacked: bool) -> None:
    """Keep some indices of one dimension, in a new tensor; of stacked experts, a list of indices for each expert."""
    tensor = tensor_of(model, name).detach()
    kept = [torch.tensor(index, device=tensor.device) for index in indices]
    if stacked:
        experts = [expert.index_select(dim - 1, index) for expert, index in zip(tensor, kept, strict=True)]
        replace_(model, name, torch.stack(experts))
    else:
        replace_(model, name, tensor.index_select(dim, kept[0]))


def _set_sizes(model: nn.Module, site: Site, keep: Sequence[int]) -> None:
    """Update the module's size attributes, configuration entries and kept heads."""
    if site.block is None:
        return
    module, block, sizes = model.get_submodule(site.path), site.block, site.sizes(len(keep))
    heads = None
    if block.arguments or block.outputs:
        before = getattr(module, "kept_heads", range(site.heads))
        heads = [before[head] for head in site.heads_of(keep)]
    dense = {"H": site.heads, "K": site.kv_heads}
    set_sizes_(module, block.data, block.counts(sizes), block.readings(sizes), dense, heads)


@dataclass(frozen=True, slots=True)
class Correction:
    """A compensator's correction of a consumer.

    Args:
        weight: the new weight [out_features, kept channels], or None to keep the old columns.
        bias: what to add to the output [out_features], or None.
        note: a short remark on this site, which is logged and written to the output.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    note: str | None = None

    def __repr__(self) -> str:
        """Return the shapes instead of the values."""
        shapes = (f"{name}={_shape(tensor)}" for name, tensor in (("weight", self.weight), ("bias", self.bias)))
        return f"Correction({', '.join(shapes)}, note={self.note!r})"


def _shape(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def apply_plan_(
    model: PreTrainedModel, sites: Sequence[Site], plan: PruningPlan, corrections: Mapping[str, Correction]
) -> None:
    """Slice the model, and update its configuration and the plan that it carries, in place.

    Args:
        model: the dense model.
        sites: its sites.
        plan: the units to keep.
        corrections: site name -> the consumer's correction.
    """
    plan.check(sites)
    plan.check_left(sites)
    add_plan_(model, sites, plan)
    slice_(model, sites, plan, corrections)
    set_pruned_config_(model, sites)
