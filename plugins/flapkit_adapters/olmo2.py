"""Families with a norm over the whole projection of all heads."""

from __future__ import annotations

from dataclasses import replace

from flapkit.interfaces import Family
from flapkit_adapters.llama import ATTENTION, MLP

WHOLE_NORM = replace(ATTENTION, parameters={"v_proj": "k"}, outputs={"q_norm": "q", "k_norm": "k"})
"""q and k keep all rows, since the norm averages over them; heads are selected from its output. v and o are sliced."""

OLMO2 = tuple(
    Family(model_type, (model_type,), "model.layers", (WHOLE_NORM, MLP), about)
    for model_type, about in {
        "olmo2": "OLMo 2; q and k keep their rows, because a norm runs over all of them.",
        "olmo3": "OLMo 3; q and k keep their rows, because a norm runs over all of them.",
    }.items()
)
