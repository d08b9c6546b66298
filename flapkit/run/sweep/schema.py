"""The schema of a sweep's file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from flapkit.system.options import PathText, Section

DENSE = "dense"
"""The name of the dense model among the methods of a table."""

METHOD = "method"
"""The key of a point that names its method."""

PARAMETERS = "parameters"
MOST_POINTS = 10_000


class Plot(Section):
    """What the plot shows: perplexity and the mean of tasks against one quantity, a line for each method."""

    x: str = Field(default=PARAMETERS, description="`parameters` (of the pruned model), or a swept key with numbers.")
    over: tuple[str, ...] = Field(
        default=(),
        description="Swept keys to average over: the line is the mean over their values, the band the range.",
    )


class SweepFile(Section):
    """A sweep: a recipe, and the values that some of its keys take."""

    recipe: str = Field(
        min_length=1,
        description="The base recipe: a file relative to the sweep's folder, or a name of `list recipes`.",
    )
    plugins: tuple[str, ...] = Field(
        default=(), description="Files of your own plugins, relative to the sweep's folder."
    )
    set: Mapping[str, Any] = Field(
        default={}, description="Dotted keys of the recipe, and their values for all points."
    )
    methods: Mapping[Annotated[str, Field(min_length=1)], Mapping[str, Any]] = Field(
        default={},
        description="Names, each with dotted keys and their values: every method with every combination of the grid is "
        "a point, and tables and plots show the name.",
    )
    grid: Mapping[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default={}, description="Dotted keys, each with a list of values: every combination is a point."
    )
    points: tuple[Mapping[str, Any], ...] = Field(
        default=(), description="Further points: dotted keys with their values; `method` names one of the methods."
    )
    plot: Plot = Field(default=Plot(), description="What the plot shows.")
    output: PathText = Field(description="Folder of the results, relative to the current directory.")

    @model_validator(mode="after")
    def _some_points(self) -> SweepFile:
        if not self.methods and not self.grid and not self.points:
            raise PydanticCustomError("points", "the sweep has no points; give `methods`, `grid` or `points`")
        if DENSE in self.methods:
            raise PydanticCustomError("methods", "the dense model is always a row, called `dense`; choose another name")
        crossed = max(len(self.methods), 1) * math.prod(map(len, self.grid.values()))
        count = len(self.points) + (crossed if self.methods or self.grid else 0)
        if count > MOST_POINTS:
            raise PydanticCustomError(
                "points",
                "the sweep has {count} points; at most {most} are allowed",
                {"count": f"{count:,}", "most": f"{MOST_POINTS:,}"},
            )
        return self
