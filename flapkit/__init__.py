"""flapkit: structured pruning of large language models without retraining.

```python
import flapkit

plan = flapkit.prune_(model, calibration, metric="wifv", searcher="al_am", compensator="bias", ratio=0.2)
flapkit.save(model, "pruned")
model = flapkit.load("pruned")
```

Importing flapkit lets transformers' Auto classes load pruned checkpoints, and gives PEFT the default targets of their
model types. It imports neither torch nor transformers; public names are imported at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from flapkit.model.registration import register, register_peft

if TYPE_CHECKING:
    from flapkit.api import FlapPruning, PruneOptions, prune_, sites
    from flapkit.checkpoint.expand import expand_lora, expand_tensor
    from flapkit.checkpoint.load import load
    from flapkit.checkpoint.push import push
    from flapkit.checkpoint.save import save
    from flapkit.execution.lightning.restore import restore_pruning_
    from flapkit.hookspecs import hookimpl
    from flapkit.system.errors import FlapkitError

    __version__: str

__all__ = [
    "FlapPruning",
    "FlapkitError",
    "PruneOptions",
    "__version__",
    "expand_lora",
    "expand_tensor",
    "hookimpl",
    "load",
    "prune_",
    "push",
    "restore_pruning_",
    "save",
    "sites",
]

_MODULES = {
    "FlapPruning": "flapkit.api",
    "FlapkitError": "flapkit.system.errors",
    "PruneOptions": "flapkit.api",
    "expand_lora": "flapkit.checkpoint.expand",
    "expand_tensor": "flapkit.checkpoint.expand",
    "hookimpl": "flapkit.hookspecs",
    "load": "flapkit.checkpoint.load",
    "prune_": "flapkit.api",
    "push": "flapkit.checkpoint.push",
    "restore_pruning_": "flapkit.execution.lightning.restore",
    "save": "flapkit.checkpoint.save",
    "sites": "flapkit.api",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("flapkit")
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Runs immediately if the module is already imported.
register_post_import_hook(register, "transformers.models.auto.configuration_auto")
register_post_import_hook(register_peft, "peft.utils.constants")
