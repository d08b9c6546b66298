"""flapkit's own architecture adapters."""

from __future__ import annotations

from collections.abc import Iterable

from flapkit import hookimpl
from flapkit.interfaces import ArchitectureAdapter, Auto, Family
from flapkit_adapters.classic import CLASSIC
from flapkit_adapters.falcon import Falcon
from flapkit_adapters.hybrid import HYBRIDS
from flapkit_adapters.llama import LIKE_LLAMA, Llama
from flapkit_adapters.mixtures import MIXTURES
from flapkit_adapters.olmo2 import OLMO2
from flapkit_adapters.vicuna import Vicuna
from flapkit_adapters.vision_language import VISION_LANGUAGE


@hookimpl
def flapkit_adapters() -> Iterable[type[ArchitectureAdapter] | Family]:
    """Offer the default adapters."""
    return [Auto, Llama, Vicuna, *LIKE_LLAMA, *CLASSIC, *OLMO2, Falcon, *MIXTURES, *HYBRIDS, *VISION_LANGUAGE]
