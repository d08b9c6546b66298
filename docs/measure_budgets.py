"""Prune a model by every kind of budget, and measure what was saved: ``python docs/measure_budgets.py [MODEL]``.

It prints a table: the budget, what it asked for, what the run's ledger says, and what the saved folder measures: the
parameters and bytes of its tensors, the bytes of the cache after a text, and with ``--latency`` the time of a token
beside the dense model's, in turns. For the time it first makes the table of block timings (``flapkit bench --blocks``);
a machine that does something else at the same time spoils both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import flapkit
from flapkit.evaluation.block_table import PICO
from flapkit.evaluation.speed import Workload
from flapkit.recipe.files import find_recipe
from flapkit.recipe.load import load_recipe
from flapkit.run.bench import bench
from flapkit.run.block_times import time_blocks
from flapkit.run.ledger import label_of, show
from flapkit.run.pipeline import run
from flapkit.system.paths import cache_folder

COLUMNS = ("budget", "what is counted", "dense", "asked", "ledger", "saved model", "of the dense")
TOKENS = 64
"""Length of the text that fills the cache."""


def budgets(dense: Mapping[str, float], latency: float | None) -> Iterator[str]:
    """Yield a budget of every kind that the model has: 85 % of it, or half of its cache."""
    yield f"{{params: {int(0.85 * dense['params'])}}}"
    yield "{ratio: 0.15, of: model}"
    yield f"{{memory: {0.85 * dense['memory'] / 1e6:.1f}MB}}"
    yield "{kv_cache: 0.5}"
    if dense["active_params"]:
        yield f"{{active_params: {int(0.85 * dense['active_params'])}}}"
    if latency is not None:
        yield f"{{latency: {latency}, on: decode}}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint's folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def measured(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Measure a model, and the tensors of its file: without a word of what the budget counted."""
    cache = model(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True).past_key_values
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    routed = getattr(model.config.get_text_config(), "num_experts_per_tok", 0)
    total = sum(tensor.numel() for tensor in tensors.values())
    idle = sum(tensor.numel() - tensor.numel() // len(tensor) * routed for tensor in experts.values())
    return {
        "params": total,
        "memory": sum(tensor.nbytes for tensor in tensors.values()),
        "kv_cache": sum(layer.keys.nbytes + layer.values.nbytes for layer in held) / TOKENS,
        "active_params": total - idle if experts else 0,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:tiny-llama")
    parser.add_argument("--recipe", default="demo", help="recipe whose method and text are used")
    parser.add_argument("--set", action="append", default=[], help="its keys, as for flapkit run")
    parser.add_argument("--latency", type=float, help="also ask for this fraction of the time of a token")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt before the timed tokens")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are timed")
    parser.add_argument("--repetitions", type=int, default=7, help="timed turns")
    asked = parser.parse_args()
    workload = Workload(1, asked.prompt, asked.tokens, asked.repetitions)
    if asked.latency is not None:
        time_blocks(asked.model, workload, dtype="float32")
    model = flapkit.load(asked.model, "float32")
    own = dict(model.named_parameters())
    dense = measured(model, own)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for budget in budgets(dense, asked.latency):
        given = [
            f"budget={budget}",
            f"model={{path: {asked.model}, dtype: float32, save_dtype: float32}}",
            "evaluate={}",
        ]
        if "latency" in budget:
            given[0] = f"budget={budget[:-1]}, prompt: {asked.prompt}}}"
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            changes = [*given, "report.error_windows=0", f"output={out}", *asked.set]
            run(load_recipe(find_recipe(asked.recipe), changes), cache=cache_folder())
            tensors, costs = weights(out), json.loads((out / "result.json").read_text(encoding="utf-8"))["costs"]
            left = measured(flapkit.load(out, "float32"), tensors)
            measure = budget[1:].partition(":")[0]
            if measure == "ratio":
                biases = sum(tensor.numel() for name, tensor in tensors.items() if name not in own)
                part = 1 - (left["params"] - biases) / dense["params"]
                cells = ["parameters removed, without biases", "", "15.00 %", "", f"{part:.2%}", ""]
            else:
                (row,) = (row for row in costs if row["measure"] == measure)
                before, after = dense.get(measure, 0.0), left.get(measure, 0.0)
                if measure == "latency":
                    speeds = bench(str(out), asked.model, workload, dtype="float32").speeds
                    before, after = (PICO / speeds[name].decode.median for name in (asked.model, str(out)))
                cells = [label_of(measure, row["detail"])]
                cells += [show(measure, number) for number in (before, row["asked"], row["pruned"], after)]
                cells.append(f"{after / before:.3f}")
            print(f"| `{budget}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
