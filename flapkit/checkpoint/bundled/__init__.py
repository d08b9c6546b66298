"""The models that flapkit ships, so that every recipe can be tried on a machine without a network."""

from __future__ import annotations

from pathlib import Path

PREFIX = "builtin:"


def bundled_models() -> dict[str, Path]:
    """Map the names of the bundled models to their folders."""
    return {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/config.json"))}
