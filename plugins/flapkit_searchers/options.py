"""Options that several searchers share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flapkit.interfaces import Count

MinUnits = Annotated[
    Count,
    Field(
        ge=0,
        description="Units (heads, neurons) that every site keeps at least; with 0, a whole attention or MLP can be "
        "removed, except for its bias.",
    ),
]

AttentionPower = Annotated[
    float,
    Field(
        gt=0, le=10, description="Attention scores are raised to this power: 2 in the released code, 1 in the paper."
    ),
]
