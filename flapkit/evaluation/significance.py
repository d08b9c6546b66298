"""Whether two models' answers to the same questions differ by more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on the same items.

    Args:
        difference: the second model's accuracy less the first's.
        stderr: standard error of the difference of paired proportions.
        only_first: items that only the first model has right.
        only_second: items that only the second has right.
        p_value: of McNemar's exact test, two-sided: how likely so uneven a split is if both are equally good.
    """

    difference: float
    stderr: float
    only_first: int
    only_second: int
    p_value: float


def compare(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two models item by item.

    McNemar, "Note on the sampling error of the difference between correlated proportions" (1947), in its exact form:
    the items that only one model has right are fair coin tosses if the models are equally good.

    Args:
        first: 1 for each item that the first model has right, else 0.
        second: the same of the second model, in the same order.

    Raises:
        ValueError: there is no item, or the models did not see the same ones.
    """
    from scipy.stats import binomtest

    items = len(first)
    if not items or items != len(second):
        raise ValueError(f"expected the same items of both models, found {items} and {len(second)}")
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
