"""Pad a model's tensors with zeros to larger sizes, without changing the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flapkit.interfaces import ModelError, Prospect, Site, count_rows, rows_of, skeleton, tensor_of

Sizes = Mapping[str, int]
"""``H`` query heads and ``K`` key/value heads of an attention, ``I`` channels of an MLP, ``E`` experts of a mixture."""

LETTERS = {"attention": "q", "mlp": "i", "mixture": "e"}
"""Kind of a site -> the layout of its consumer's columns."""


def sizes_of(site: Site) -> Sizes:
    """Return a site's sizes."""
    return {"H": site.heads, "K": site.kv_heads} if site.kind == "attention" else site.sizes(site.units)


def rounded_up(site: Site, multiple_of: int) -> Sizes:
    """Return the next larger sizes with a multiple of some number of channels; attention grows by key/value heads."""
    if site.kind == "mixture":
        return sizes_of(site)
    if site.kind == "mlp":
        return {"I": math.ceil(site.units / multiple_of) * multiple_of}
    group = site.heads // site.kv_heads
    step = multiple_of // math.gcd(multiple_of, group * site.channels // site.heads)
    kv_heads = math.ceil(site.kv_heads / step) * step
    return {"H": kv_heads * group, "K": kv_heads}


def one_less(site: Site) -> Sizes:
    """Return the sizes with one unit less, as an example of a pruned site."""
    if site.kind == "mixture":
        return {"E": max(site.least, site.units - site.runs)}
    if site.kind == "mlp":
        return {"I": max(1, site.units - 1)}
    if site.kv_heads == 1 or site.runs > 1:
        # Units are query heads.
        return {"H": max(site.runs, site.heads - site.runs), "K": site.kv_heads}
    return {"H": site.heads - site.heads // site.kv_heads, "K": site.kv_heads - 1}


def widest(sites: tuple[Site, ...]) -> dict[str, Sizes]:
    """Return sizes to which all layers can be padded: site name -> sizes.

    Raises:
        ModelError: the layers keep different numbers of query heads for a key/value head, or of experts.
    """
    roles: dict[str, dict[str, int]] = {}
    for site in sites:
        largest = roles.setdefault(_role(site), {})
        for name, size in sizes_of(site).items():
            largest[name] = max(size, largest.get(name, 0))
    for site in sites:
        wanted = roles[_role(site)]
        if wanted.get("E", 0) > site.units and site.kind == "mixture":
            raise ModelError(
                f"{site.name}: the number of experts, {site.units}, cannot be padded to {wanted['E']}, as the "
                "router would choose the padding; choose a searcher that prunes all layers equally (ul_*)"
            )
        if wanted.get("K", 1) > 1 and site.heads * wanted["K"] != wanted["H"] * site.kv_heads:
            raise ModelError(
                f"{site.name}: the numbers of query heads and of key/value heads, {site.heads} and {site.kv_heads}, "
                f"cannot be padded to {wanted['H']} and {wanted['K']}; prune whole key/value groups (unit: kv_group)"
            )
    return {site.name: roles[_role(site)] for site in sites}


def lengths(prospect: Prospect, sizes: Mapping[str, Sizes]) -> dict[tuple[str, int], tuple[str, int]]:
    """Return the new lengths of the parameters' dimensions for other sizes.

    Args:
        prospect: the model.
        sizes: site name -> its new sizes.

    Returns:
        (parameter, dimension) -> (layout, length) of every dimension that the sizes determine.
    """
    return {
        (param, dim): (
            layout,
            length * count_rows(layout, dict(sizes[site.name])) // count_rows(layout, dict(sizes_of(site))),
        )
        for site in prospect.sites
        for param, dim, layout, length in _parts(prospect, site)
    }


def padder(prospect: Prospect, sizes: Mapping[str, Sizes]) -> Callable[[str, Tensor], Tensor]:
    """Return a function that pads a model's tensors with zeros; the consumer's padded columns are zero, too.

    Args:
        prospect: the model.
        sizes: site name -> its new sizes, none smaller.

    Returns:
        A function from a tensor's name and value to the padded tensor.

    Raises:
        ModelError: a fused tensor would have to grow.
    """
    wanted = lengths(prospect, sizes)

    def pad(name: str, tensor: Tensor) -> Tensor:
        for dim, length in enumerate(tensor.shape):
            layout, new = wanted.get((name, dim), ("", length))
            if new == length:
                continue
            if len(layout) > 1:
                raise ModelError(f"{name}: cannot pad a fused tensor (layout {layout})")
            zeros = tensor.new_zeros([*tensor.shape[:dim], new - length, *tensor.shape[dim + 1 :]])
            tensor = torch.cat([tensor, zeros], dim)
        return tensor

    return pad


def _role(site: Site) -> str:
    """Return the name of a site's block, such as ``attention``; all experts have the same."""
    return site.block.name if site.block else site.kind


def _parts(prospect: Prospect, site: Site) -> Iterator[tuple[str, int, str, int]]:
    """Yield a site's parameters: name, dimension of its units, layout, length of that dimension."""
    block: Any = site.block
    module = skeleton(prospect.config).get_submodule(site.path)
    yield site.weight, site.dim, LETTERS[site.kind], site.channels
    for name, layout in block.parameters.items():
        for param, dim in rows_of(module, block.data, name):
            yield f"{site.path}.{param}", dim, layout, tensor_of(module, param).shape[dim]
