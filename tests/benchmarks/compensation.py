"""Measure compensators side by side: ``python tests/benchmarks/compensation.py RECIPE FOLDER [--set KEY=VALUE]...``.

Every figure is of a ``flapkit run`` of the recipe in a process of its own, with another ratio, metric and compensator.
Printed in Markdown: for every ratio the perplexity of the recipe's first evaluation text, then the most processor
seconds and the highest peak memory of the row's processes, reading text and evaluation included. The metric ``kfac`` is
ranked by ``per_parameter``, the others by the recipe's searcher.

What a run gave is kept in FOLDER; the same command goes on where it was stopped, and runs nothing twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

LORA = "LORA"
"""Stands for the options of the recovery in a way of compensating."""

NO_INTERCEPT = {"name": "least_squares", "intercept": False}
WAYS: dict[str, tuple[list[Any], bool]] = {
    "none": (["none"], False),
    "bias": (["bias"], False),
    "least squares": (["least_squares"], False),
    "least squares, no intercept": ([NO_INTERCEPT], False),
    "bias + LoRA": (["bias", LORA], False),
    "least squares + LoRA": (["least_squares", LORA], False),
    "bias, sequential": (["bias"], True),
    "least squares, sequential": (["least_squares"], True),
    "least squares, sequential + LoRA": (["least_squares", LORA], True),
}
"""What rows are called -> the compensators, and whether calibration is sequential."""

WITHOUT_ASKING = tuple(name for name, (_, sequential) in WAYS.items() if not sequential)


@dataclass(frozen=True)
class Measured:
    """What one run gave.

    Args:
        dense: perplexity of the dense model.
        perplexity: of what the run wrote.
        seconds: processor time of the process.
        memory: its peak resident memory, in bytes.
    """

    dense: float
    perplexity: float
    seconds: float
    memory: int


def settings(ratio: float, metric: str, way: str, lora: str) -> list[str]:
    """Return what a run overrides of the recipe."""
    compensators, sequential = WAYS[way]
    asked = json.dumps(compensators).replace(json.dumps(LORA), lora)
    searcher = ["searcher=per_parameter"] if metric == "kfac" else []
    return [
        f"budget.ratio={ratio:g}",
        f"metric={metric}",
        *searcher,
        f"compensator={asked}",
        f"calibration.sequential={json.dumps(sequential)}",
    ]


def measure(recipe: str, overrides: Sequence[str], row: Path) -> Measured:
    """Run, or read what the same run gave before.

    Args:
        recipe: the recipe.
        overrides: of its keys.
        row: what its folder, its log and its figures are called, without an ending.

    Raises:
        SystemExit: the run failed.
    """
    figures, said = (row.with_name(row.name + ending) for ending in (".json", ".log"))
    asked = [recipe, *overrides]
    if figures.is_file() and (known := json.loads(figures.read_text()))["asked"] == asked:
        return Measured(**known["measured"])
    command = [sys.executable, "-m", "flapkit", "run", recipe, "--json", "--no-cache", "--overwrite"]
    command += [part for override in (*overrides, f"output={row}") for part in ("--set", override)]
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        with process.stdout as events:
            lines = events.readlines()
        # Unlike RUSAGE_CHILDREN, which is the peak of all children so far.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{row.name}: failed with code {process.returncode}; see {said}")
    text = next(iter(json.loads(lines[-1])["perplexity"].values()))
    found = text.get("recovered", text["pruned"])
    # Linux counts in kilobytes of 1024 bytes.
    measured = Measured(text["dense"], found, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss)
    figures.write_text(json.dumps({"asked": asked, "measured": asdict(measured)}, indent=2) + "\n")
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, each row as soon as its runs are done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a recipe, as `flapkit run` takes it")
    parser.add_argument("folder", type=Path, help="where runs are kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--metrics", nargs="+", default=["wifv"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WITHOUT_ASKING))
    parser.add_argument("--lora", default="{name: lora}", help="the compensator that trains, in YAML")
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    ratios = " | ".join(f"{100 * ratio:g} %" for ratio in asked.ratios)
    print(f"| metric | compensation | {ratios} | seconds | memory |\n|---|---|{'---|' * len(asked.ratios)}---|---|")
    for metric, way in product(asked.metrics, asked.ways):
        found = []
        for ratio in asked.ratios:
            row = asked.folder / f"{100 * ratio:g} {metric} {way}".replace(", ", " ").replace(" ", "-")
            found.append(measure(asked.recipe, [*asked.set, *settings(ratio, metric, way, asked.lora)], row))
        perplexities = " | ".join(f"{each.perplexity:.3f}" for each in found)
        seconds, memory = max(each.seconds for each in found), max(each.memory for each in found)
        print(f"| `{metric}` | {way} | {perplexities} | {seconds:.0f} | {memory / 1e9:.2f} GB |", flush=True)
    print(f"\nThe dense model has {found[0].dense:.3f}.")


if __name__ == "__main__":
    main()
