"""Measure compensators side by side on one recipe: ``python tests/benchmarks/compensation.py RECIPE``.

Prints a Markdown table: ratio, metric, compensation, perplexity of the recipe's first evaluation text, processor
seconds from the first calibration batch to the pruned model, and the memory of the statistics. Nothing is kept from
one row to the next. ``kfac`` is ranked by ``per_parameter``, the other metrics by the recipe's searcher.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence

import torch

import flapkit
from flapkit.checkpoint import load, load_tokenizer
from flapkit.evaluation.perplexity import Perplexity, cross_entropy
from flapkit.passes import peak_memory
from flapkit.pruning import Method
from flapkit.recipe import load_recipe
from flapkit.registry import Registry
from flapkit.stages.target import find_target
from flapkit.stages.text import read_text
from flapkit.windows import Windows

WAYS = {
    "none": ("none", {}, False),
    "bias": ("bias", {}, False),
    "bias, sequential": ("bias", {}, True),
    "least squares, no intercept": ("least_squares", {"intercept": False}, False),
    "least squares": ("least_squares", {}, False),
    "least squares, sequential": ("least_squares", {}, True),
}


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: Windows, batch_size: int = 16) -> float:
    """Return exp of the mean over windows of each window's mean cross-entropy."""
    found = Perplexity()
    for inputs, labels in zip(windows.input_ids.split(batch_size), windows.labels.split(batch_size), strict=True):
        found.update(*cross_entropy(model(inputs, use_cache=False).logits, labels))
    return float(found.compute().over_windows)


def rows(recipe: str, ratios: Sequence[float], metrics: Sequence[str], ways: Sequence[str]) -> Iterator[str]:
    """Yield the table's lines."""
    loaded = load_recipe(recipe)
    path, target, registry = loaded.recipe.model.path, find_target(loaded), Registry.load()
    text = read_text(loaded.recipe, target, load_tokenizer(path))
    evaluation = next(iter(text.evaluations.values())).windows
    dense = load(path).float().eval()
    yield "| removed | metric | compensation | perplexity | seconds | statistics |"
    yield "|---|---|---|---|---|---|"
    yield f"| 0 | | dense | {perplexity(dense, evaluation):.2f} | | |"
    for ratio in ratios:
        for metric in metrics:
            for way in ways:
                name, options, sequential = WAYS[way]
                method = Method(
                    registry.create("metric", metric),
                    registry.create("searcher", "per_parameter") if metric == "kfac" else loaded.searcher,
                    (registry.create("compensator", name, options),),
                )
                model, start = copy.deepcopy(dense), time.process_time()
                flapkit.prune_(
                    model,
                    text.calibration,
                    method.metric,
                    method.searcher,
                    method.compensators[0],
                    ratio,
                    batch_size=text.batch_size,
                    sequential=sequential,
                )
                seconds = time.process_time() - start
                memory = peak_memory(target.sites, method, 4 * 10**9, sequential=sequential) / 1e6
                found = perplexity(model, evaluation)
                yield f"| {ratio:.0%} | {metric} | {way} | {found:.2f} | {seconds:.1f} | {memory:.2f} MB |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--metrics", nargs="+", default=["wifv"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    asked = parser.parse_args()
    for line in rows(asked.recipe, asked.ratios, asked.metrics, asked.ways):
        print(line, flush=True)
