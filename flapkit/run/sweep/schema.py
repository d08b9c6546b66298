"""What a sweep's file says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from flapkit.system.options import PathText, Section

PARAMETERS = "parameters"
MOST_POINTS = 10_000


class Plot(Section):
    """What the plot shows: perplexity against something, a line for each method."""

    x: str = Field(
        default=PARAMETERS, description="`parameters` (of the pruned model), or a key that is swept and holds numbers."
    )
    over: tuple[str, ...] = Field(
        default=(),
        description="Swept keys whose values are runs of one method: the line is their mean, the band their range.",
    )


class SweepFile(Section):
    """A sweep: a recipe, and the values that some of its keys are given in turn."""

    recipe: str = Field(
        min_length=1,
        description="The base: a recipe's file, relative to the sweep's folder, or a name of `list recipes`.",
    )
    plugins: tuple[str, ...] = Field(
        default=(), description="Python files of your own plugins, relative to the sweep's folder."
    )
    set: Mapping[str, Any] = Field(default={}, description="Dotted keys of the recipe, with values for all points.")
    grid: Mapping[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default={}, description="Dotted keys, each with a list of values: every combination is a point."
    )
    points: tuple[Mapping[str, Any], ...] = Field(
        default=(), description="Further points, each with the dotted keys that it sets."
    )
    plot: Plot = Field(default=Plot(), description="What the plot shows.")
    output: PathText = Field(description="Folder of the results, relative to the current directory.")

    @model_validator(mode="after")
    def _some_points(self) -> SweepFile:
        if not self.grid and not self.points:
            raise PydanticCustomError("points", "there is no point; give `grid` or `points`")
        count = len(self.points) + (math.prod(map(len, self.grid.values())) if self.grid else 0)
        if count > MOST_POINTS:
            raise PydanticCustomError(
                "points",
                "there are {count} points; {most} is the most",
                {"count": f"{count:,}", "most": f"{MOST_POINTS:,}"},
            )
        return self
