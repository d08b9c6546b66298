"""Measure what starting up costs: processor time of whole processes, medians of five.

``python tests/benchmarks/start_up.py PRUNED`` with a pruned checkpoint, for ``flapkit show``.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPETITIONS = 5
TYPO = "model: builtin:tiny-llama\ncalibrationn: {dataset: wikitext2}\nbudget: {ratio: 0.2}\noutput: out\n"


def cost(command: list[str]) -> tuple[float, float]:
    """Return the processor time and the wall time of a process [s]."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], capture_output=True, check=False)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main(pruned: str) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(TYPO, encoding="utf-8")
        code = ["import typer, rich", "import torch", "from transformers import AutoModelForCausalLM", "import flapkit"]
        flapkit = [["--help"], ["--version"], ["list"], ["show", pruned], ["check", str(recipe)]]
        commands = [["-c", line] for line in code] + [["-m", "flapkit", *arguments] for arguments in flapkit]
        print("| command | processor, s | wall, s |\n|---|---|---|")
        for command in commands:
            costs = [cost(command) for _ in range(REPETITIONS)]
            processor, wall = (statistics.median(found) for found in zip(*costs, strict=True))
            print(f"| `{' '.join(command)}` | {processor:.2f} | {wall:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
