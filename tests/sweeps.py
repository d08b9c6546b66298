"""A small sweep to test with."""

from __future__ import annotations

from pathlib import Path

import yaml
from conftest import TEXT, write_recipe

SWEEP = {
    "recipe": "base.yaml",
    "grid": {"metric": ["wifv", "magnitude"], "budget.ratio": [0.2, 0.4]},
    "output": "out",
}


def write_sweep(folder: Path, **changes) -> Path:
    """Write the text, the base recipe and the sweep; return the sweep's file."""
    (folder / "text.txt").write_text(TEXT)
    write_recipe(folder, "base.yaml", output="unused")
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))
    return path
