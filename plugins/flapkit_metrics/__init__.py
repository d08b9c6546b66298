"""flapkit's own importance metrics."""

from __future__ import annotations

from collections.abc import Iterable

from flapkit import hookimpl
from flapkit.interfaces import ImportanceMetric
from flapkit_metrics.wifv import WIFV


@hookimpl
def flapkit_metrics() -> Iterable[type[ImportanceMetric]]:
    """Offer the default metrics."""
    return [WIFV]
