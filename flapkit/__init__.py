"""flapkit: structured pruning of large language models without retraining.

```python
import flapkit

plan = flapkit.prune_(model, calibration, metric="wifv", searcher="al_am", compensator="bias", ratio=0.2)
flapkit.save(model, "pruned", plan)
model = flapkit.load("pruned")
```

Importing flapkit makes transformers' Auto classes load pruned checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flapkit.api import prune_, sites
from flapkit.checkpoint.expand import expand_lora, expand_tensor
from flapkit.checkpoint.load import load
from flapkit.checkpoint.push import push
from flapkit.checkpoint.save import save
from flapkit.hookspecs import hookimpl
from flapkit.model.classes import register
from flapkit.system.errors import FlapkitError

if TYPE_CHECKING:
    from flapkit.api import FlapPruning

__all__ = [
    "FlapPruning",
    "FlapkitError",
    "expand_lora",
    "expand_tensor",
    "hookimpl",
    "load",
    "prune_",
    "push",
    "save",
    "sites",
]

register()


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, and only the callback needs it.
    if name == "FlapPruning":
        from flapkit.api import FlapPruning

        return FlapPruning
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
