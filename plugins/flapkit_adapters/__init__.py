"""flapkit's own architecture adapters."""

from __future__ import annotations

from collections.abc import Iterable

from flapkit import hookimpl
from flapkit.interfaces import ArchitectureAdapter
from flapkit_adapters.llama import Llama
from flapkit_adapters.vicuna import Vicuna


@hookimpl
def flapkit_adapters() -> Iterable[type[ArchitectureAdapter]]:
    """Offer the default adapters."""
    return [Llama, Vicuna]
