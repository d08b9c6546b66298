"""Hybrids: models in which only some of the layers have attention."""

from __future__ import annotations

from dataclasses import replace

from flapkit.interfaces import Block, Family
from flapkit_adapters.llama import ATTENTION

HYBRIDS = (
    Family(
        "lfm2",
        ("lfm2",),
        "model.layers",
        (replace(ATTENTION, consumer="out_proj"), Block("mlp", "feed_forward", "w2", {"w1": "i", "w3": "i"})),
        "LFM2: short convolutions in most layers, attention in some.",
    ),
)
