"""A small sweep to test with."""

from __future__ import annotations

from pathlib import Path

import yaml

RECIPE = {
    "model": {"path": "builtin:tiny-llama", "dtype": "float32"},
    "calibration": {"dataset": "text.txt", "samples": 8, "length": 32},
    "budget": {"ratio": 0.2},
    "evaluate": {"perplexity": [{"dataset": "text.txt", "length": 32, "windows": 4}]},
    "trainer": {"accelerator": "cpu"},
    "output": "unused",
}
SWEEP = {
    "recipe": "base.yaml",
    "grid": {"metric": ["wifv", "magnitude"], "budget.ratio": [0.2, 0.4]},
    "output": "out",
}


def write_sweep(folder: Path, **changes) -> Path:
    """Write the text, the base recipe and the sweep; return the sweep's file."""
    (folder / "text.txt").write_text("def pruned(model):\n    return model\n" * 200)
    (folder / "base.yaml").write_text(yaml.safe_dump(RECIPE))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))
    return path
