"""The scores of zero-shot tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

BatchSize = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of a task.

    Args:
        value: as lm-eval aggregates it.
        stderr: its standard error; None where lm-eval gives none.
        items: the metric of each item, in the task's order; empty where an item's is no number.
    """

    value: float
    stderr: float | None
    items: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TaskScores:
    """A task's scores.

    Args:
        source: the local file of its rows, or lm-eval's own dataset.
        items: questions that were asked.
        sha256: hash of every text that was scored and of the right answers: equal where the questions are.
        few_shot: solved examples in front of each question.
        truncated: requests that lost their beginning since they are longer than the model's context.
        scores: metric -> score.
    """

    source: str
    items: int
    sha256: str
    few_shot: int
    truncated: int
    scores: Mapping[str, Score]
