"""What a model costs in every measure, before and after: asked for and got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flapkit.model.budget import Budget, Cost, Measure
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site


@dataclass(frozen=True, slots=True)
class CostRow:
    """What a model costs in one measure, before and after.

    Args:
        measure: what is counted.
        detail: what it depends on, such as a dtype.
        dense: of the dense model.
        pruned: of the pruned model.
        asked: the most that the budget leaves; None where it counts something else, or is a ratio.
    """

    measure: Measure
    detail: str
    dense: float
    pruned: float
    asked: float | None = None


def ledger(budget: Budget, costs: Sequence[Cost], sites: Sequence[Site], plan: PruningPlan) -> list[CostRow]:
    """Count what a model costs in every measure before and after a plan, its corrections included.

    Args:
        budget: how much was to be removed.
        costs: the model's cost in every measure.
        sites: the model's sites.
        plan: the units to keep.
    """
    rows = []
    for cost in costs:
        asked = cost.shown(budget.left) if budget.asked and budget.cost.measure == cost.measure else None
        rows.append(CostRow(cost.measure, cost.detail, cost.shown(cost.total), cost.left(sites, plan), asked))
    return rows


_SHOWN: Mapping[str, tuple[str, float, str]] = {
    "params": ("parameters", 1, ",.0f"),
    "active_params": ("parameters used per token", 1, ",.0f"),
    "memory": ("weights, MB", 1e6, ",.1f"),
    "kv_cache": ("KV cache per token, bytes", 1, ",.0f"),
    "latency": ("time by the table, ms", 1e9, ",.2f"),
}
"""Measure -> its label, what numbers are divided by, and their format."""


def label_of(measure: str, detail: str = "") -> str:
    """Return the label of a measure's row, as in ``weights, MB (bfloat16)``."""
    return f"{_SHOWN[measure][0]}{f' ({detail})' if detail else ''}"


def show(measure: str, value: float) -> str:
    """Write a number of a measure, in the unit of its label."""
    _, divisor, form = _SHOWN[measure]
    return format(value / divisor, form)
