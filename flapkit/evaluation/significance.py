"""Test whether the accuracies of two models on the same items differ by more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on the same items.

    Args:
        difference: the second model's accuracy minus the first's.
        stderr: standard error of the difference of paired proportions.
        only_first: items that only the first model answers correctly.
        only_second: items that only the second model answers correctly.
        p_value: of McNemar's exact test, two-sided.
    """

    difference: float
    stderr: float
    only_first: int
    only_second: int
    p_value: float


def compare(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two models item by item.

    McNemar, "Note on the sampling error of the difference between correlated proportions" (1947), in its exact form:
    under the null hypothesis, an item that only one model answers correctly is equally likely to be either's.

    Args:
        first: 1 for each item that the first model answers correctly, else 0.
        second: the same for the second model, in the same order.

    Raises:
        ValueError: there are no items, or the numbers of items differ.
    """
    from scipy.stats import binomtest

    items = len(first)
    if not items or items != len(second):
        raise ValueError(f"expected the same items for both models, found {items} and {len(second)}")
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(b > a for a, b in zip(first, second, strict=True))
    uneven, difference = only_first + only_second, only_second - only_first
    return Paired(
        difference=difference / items,
        stderr=math.sqrt(max(0.0, uneven - difference**2 / items)) / items,
        only_first=only_first,
        only_second=only_second,
        p_value=float(binomtest(only_first, uneven).pvalue) if uneven else 1.0,
    )
