"""Families whose norm goes over the whole projection of all heads."""

from __future__ import annotations

from dataclasses import replace

from flapkit.interfaces import Family
from flapkit_adapters.llama import ATTENTION, MLP

WHOLE_NORM = replace(ATTENTION, parameters={"v_proj": "k"}, outputs={"q_norm": "q", "k_norm": "k"})
"""The rows of q and k stay, since the norm counts them all; what it returns is picked by head. v and o are cut."""

OLMO2 = tuple(
    Family(model_type, (model_type,), "model.layers", (WHOLE_NORM, MLP), about)
    for model_type, about in {
        "olmo2": "OLMo 2; q and k keep their rows, since a norm goes over all of them.",
        "olmo3": "OLMo 3; q and k keep their rows, since a norm goes over all of them.",
    }.items()
)
