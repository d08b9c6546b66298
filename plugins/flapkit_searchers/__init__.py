"""flapkit's own structure searchers."""

from __future__ import annotations

from collections.abc import Iterable

from flapkit import hookimpl
from flapkit.interfaces import StructureSearcher
from flapkit_searchers.al_am import ALAM


@hookimpl
def flapkit_searchers() -> Iterable[type[StructureSearcher]]:
    """Offer the default searchers."""
    return [ALAM]
