"""The scores of zero-shot tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from typing_extensions import TypedDict

BatchSize = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of a task.

    Args:
        value: lm-eval's aggregate.
        stderr: its standard error; None if lm-eval gives none.
        items: the metric of each item, in the task's order; empty if an item's value is not a number.
    """

    value: float
    stderr: float | None
    items: tuple[float, ...]


class Figure(TypedDict):
    """A score and its standard error, without the items."""

    value: float
    stderr: float | None


@dataclass(frozen=True, slots=True)
class TaskScores:
    """A task's scores.

    Args:
        source: the local file of its rows, or lm-eval's own dataset.
        items: number of items.
        sha256: hash of all scored texts and correct answers; equal if the items are equal.
        few_shot: number of few-shot examples.
        truncated: number of requests longer than the model's context, whose beginning was cut off.
        scores: metric -> score.
    """

    source: str
    items: int
    sha256: str
    few_shot: int
    truncated: int
    scores: Mapping[str, Score]
