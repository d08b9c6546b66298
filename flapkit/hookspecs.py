"""The hooks with which a plugin offers components: one for each interface.

```python
from flapkit import hookimpl

@hookimpl
def flapkit_metrics():
    return [MyMetric]
```
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from flapkit.checkpoint.formats import Exporter
    from flapkit.model.adapter import ArchitectureAdapter
    from flapkit.model.declaration import Family
    from flapkit.pruning.components import Compensator, ImportanceMetric, StructureSearcher

hookspec = pluggy.HookspecMarker("flapkit")
hookimpl = pluggy.HookimplMarker("flapkit")


@hookspec
def flapkit_metrics() -> Iterable[type[ImportanceMetric]]:  # type: ignore[empty-body]
    """Offer importance metrics, as classes."""


@hookspec
def flapkit_searchers() -> Iterable[type[StructureSearcher]]:  # type: ignore[empty-body]
    """Offer structure searchers, as classes."""


@hookspec
def flapkit_compensators() -> Iterable[type[Compensator]]:  # type: ignore[empty-body]
    """Offer compensators, as classes."""


@hookspec
def flapkit_adapters() -> Iterable[type[ArchitectureAdapter] | Family]:  # type: ignore[empty-body]
    """Offer architecture adapters: declarations, or classes where the declaration depends on the configuration."""


@hookspec
def flapkit_exporters() -> Iterable[type[Exporter]]:  # type: ignore[empty-body]
    """Offer exporters, as classes."""
