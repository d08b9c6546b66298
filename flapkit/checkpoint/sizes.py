"""The heads and widths of a pruned model's layers beside those of the dense one, for ``flapkit.json``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from flapkit.checkpoint.folder import PARAMS
from flapkit.model.classes import dense_config
from flapkit.model.declaration import Family, declaration_of
from flapkit.model.empty import skeleton
from flapkit.model.layout import sites_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def layer_sizes(config: PreTrainedConfig) -> dict[str, dict[str, dict[str, int]]]:
    """Compare the heads, experts and channels of a pruned model with those of the dense one.

    Args:
        config: the pruned model's configuration.

    Returns:
        Layer -> name -> how many are ``kept``, and how many the ``dense`` model has; also of the parameters of the
        layer's attention and MLP.

    Raises:
        ModelError: the configuration is damaged.
    """
    family = declaration_of(config)
    kept, dense = _counts(config, family), _counts(dense_config(config), family)
    layers: dict[str, dict[str, dict[str, int]]] = {}
    for layer, name in dense:
        counts = {"kept": kept[layer, name], "dense": dense[layer, name]}
        layers.setdefault(str(layer), {})[name] = counts
    return layers


def _counts(config: PreTrainedConfig, family: Family) -> Counter[tuple[int, str]]:
    """Count the heads, experts and channels of each layer, and the parameters of its blocks: (layer, name) -> count."""
    model = skeleton(config)
    sites = sites_of(model, family)
    counts = Counter[tuple[int, str]]()
    for site in sites:
        if site.kind == "attention":
            counts[site.layer, "heads"] = site.heads
            counts[site.layer, "KV heads"] = site.kv_heads
        elif site.kind == "mixture":
            counts[site.layer, "experts"] = site.units
        else:
            counts[site.layer, f"{site.block_name} width"] = site.channels
    paths = {(site.layer, site.path) for site in sites}
    # The module of the experts is part of that of the mixture.
    owned = {(layer, parameter) for layer, path in paths for parameter in model.get_submodule(path).parameters()}
    for layer, parameter in owned:
        counts[layer, PARAMS] += parameter.numel()
    return counts
