"""The heads and widths of a pruned model's layers beside those of the dense one, for ``flapkit.json``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from flapkit.checkpoint.folder import PARAMETERS
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
        Layer -> name -> how many are ``kept``, and how many the ``dense`` model has; ``PARAMETERS`` are those of the
        layer's pruned blocks.

    Raises:
        ModelError: the configuration is damaged.
    """
    family = declaration_of(config)
    kept, dense = _counts(config, family), _counts(dense_config(config), family)
    layers: dict[str, dict[str, dict[str, int]]] = {}
    for layer, name in dense:
        counts = {"kept": kept.get((layer, name), 0), "dense": dense[layer, name]}
        layers.setdefault(str(layer), {})[name] = counts
    return layers


def _counts(config: PreTrainedConfig, family: Family) -> dict[tuple[int, str], int]:
    """Count the heads, experts, channels and pruned blocks' parameters of each layer: (layer, name) -> count."""
    counts = Counter[tuple[int, str]]()
    model = skeleton(config)
    sites = sites_of(model, family)
    paths = {(site.layer, site.path) for site in sites}
    # A set: the module of the experts is part of that of the mixture.
    for layer, of in {(layer, of) for layer, path in paths for of in model.get_submodule(path).parameters()}:
        counts[layer, PARAMETERS] += of.numel()
    for site in sites:
        name = site.block_name
        if site.kind == "attention":
            counts[site.layer, "heads"] = site.heads
            counts[site.layer, "KV heads"] = site.kv_heads
        elif site.kind == "mixture":
            counts[site.layer, "experts"] = site.units
        else:
            counts[site.layer, f"{name} width"] = site.channels
    return counts
