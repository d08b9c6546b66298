"""What statistics and repair cost beside a plain forward pass: ``python tests/benchmarks/gram.py MODEL``.

All are measured in turns in one process, each as the least processor time of some rounds; ratios count, seconds depend
on the machine. The text is random: no figure here depends on it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

import flapkit
from flapkit.checkpoint.load import load
from flapkit.execution.lightning.data import held_out
from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.pruning.algorithm import find_corrections
from flapkit.pruning.collector import Batch, measure, run_batch
from flapkit.pruning.gram import FittedGram, Gram, HeldOutGram
from flapkit.pruning.moments import Moments
from flapkit.registry import COMPENSATOR, SEARCHER, Registry


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    model = load(asked.model, "float32")
    batches = batches_of(model, asked.windows, asked.length)
    sites = flapkit.sites(model)
    kinds = {
        "moments": [Moments],
        "moments and Gram": [Moments, Gram],
        "moments and Grams of both parts": [Moments, FittedGram, HeldOutGram],
    }
    work: dict[str, Callable[[], object]] = {"forward": lambda: [run_batch(model, batch) for batch in batches]}
    for name, statistics in kinds.items():
        work[name] = lambda statistics=statistics: measure(model, sites, statistics, batches)
    found = measure(model, sites, kinds["moments and Grams of both parts"], batches)
    registry, plan = Registry.load(), uniform_plan(model, asked.ratio)
    for name in ("bias", "least_squares"):
        component = registry.create(COMPENSATOR, name)
        work[f"repair: {name}"] = lambda component=component: find_corrections(model, sites, found, [component], plan)
    seconds = in_turns(work, asked.rounds)
    for name, value in seconds.items():
        print(f"{name:34} {value:8.2f} s {value / seconds['forward']:6.3f}")


def batches_of(model: PreTrainedModel, windows: int, length: int) -> list[Batch]:
    """Draw random windows, eight in a batch, one in four of them held out."""
    tokens = torch.randint(model.config.vocab_size, (windows, length), generator=torch.Generator().manual_seed(0))
    parts = zip(tokens.split(8), held_out(windows).split(8), strict=True)
    return [{"input_ids": part, "held_out": marks} for part, marks in parts]


def uniform_plan(model: PreTrainedModel, ratio: float) -> PruningPlan:
    """Remove the same ratio of every site."""
    sites = flapkit.sites(model)
    scores = {site.name: torch.arange(site.units, dtype=torch.float64)[:, None] for site in sites}
    return Registry.load().create(SEARCHER, "ul_um").search(sites, scores, Budget.over(sites, ratio))


def in_turns(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least processor time of each, in seconds."""
    least = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, run in work.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


if __name__ == "__main__":
    main()
