"""flapkit: structured pruning of large language models without retraining."""

from __future__ import annotations

from flapkit.errors import FlapkitError
from flapkit.hookspecs import hookimpl

__all__ = ["FlapkitError", "hookimpl"]
