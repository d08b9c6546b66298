"""The heads and widths of a pruned model's layers beside those of the dense one, for ``flapkit.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flapkit.model.classes import dense_config
from flapkit.model.declaration import Family, declaration_of
from flapkit.model.empty import skeleton
from flapkit.model.layout import sites_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def layer_sizes(config: PreTrainedConfig) -> dict[str, dict[str, str]]:
    """Compare the heads, experts and channels of a pruned model with those of the dense one.

    Args:
        config: the pruned model's configuration.

    Returns:
        Layer -> name -> ``4 of 6``.

    Raises:
        ModelError: the configuration is damaged.
    """
    family = declaration_of(config)
    kept, dense = _counts(config, family), _counts(dense_config(config), family)
    layers: dict[str, dict[str, str]] = {}
    for layer, name in dense:
        layers.setdefault(str(layer), {})[name] = f"{kept.get((layer, name), 0)} of {dense[layer, name]}"
    return layers


def _counts(config: PreTrainedConfig, family: Family) -> dict[tuple[int, str], int]:
    """Count the heads, experts and channels of each layer: (layer, name) -> count."""
    counts = {}
    for site in sites_of(skeleton(config), family):
        name = site.block.name if site.block else site.kind
        if site.kind == "attention":
            counts[site.layer, "heads"] = site.heads
            counts[site.layer, "KV heads"] = site.kv_heads
        elif site.kind == "mixture":
            counts[site.layer, "experts"] = site.units
        else:
            counts[site.layer, f"{name} width"] = site.channels
    return counts
