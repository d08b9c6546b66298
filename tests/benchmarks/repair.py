"""What calibration and repair cost beside a forward pass, in turns in one process.

```
python tests/benchmarks/repair.py MODEL TEXT [WINDOWS]
```

MODEL is a checkpoint, TEXT a file to calibrate on. One forward pass runs the decoder layers over the same windows (128
tokens, 8 at once). Printed are medians of three turns, and how often each layer ran.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

import flapkit
from flapkit.checkpoint.load import load, load_tokenizer
from flapkit.execution.executor import CalibrationText, prune_
from flapkit.execution.whole import WholeExecutor
from flapkit.model.budget import Budget
from flapkit.model.surgery import share
from flapkit.pruning.algorithm import Method
from flapkit.pruning.collector import measure
from flapkit.registry import Registry
from flapkit.text.windows import draw_windows

TURNS = 3


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def main(path: str, text: str, windows: int = 32) -> None:
    """Time each part in turns."""
    model: PreTrainedModel = load(path, "float32")
    sites = flapkit.sites(model)
    documents = [Path(text).read_text(encoding="utf-8")[:2_000_000]]
    tokens = draw_windows(
        load_tokenizer(path), documents, None, samples=windows, length=128, seed=0, vocab_size=model.config.vocab_size
    )
    calibration, registry = CalibrationText(tokens, 8), Registry.load()
    budget = Budget.over(sites, 0.2)
    runs: list[int] = []
    model.get_submodule(sites[0].consumer.rpartition(".")[0]).register_forward_hook(lambda *_: runs.append(1))

    def method(compensator: str) -> Method:
        metric, searcher = registry.create("metric", "wifv"), registry.create("searcher", "al_am")
        return Method(metric, searcher, (registry.create("compensator", compensator),))

    def forward() -> None:
        for batch in tokens.split(8):
            model.base_model(input_ids=batch, use_cache=False)

    def calibrate(compensator: str) -> None:
        batches = calibration.data().predict_dataloader()
        measured[compensator] = measure(model, sites, method(compensator).statistics, batches)

    def repair(compensator: str) -> None:
        executor = WholeExecutor(share(model, sites), sites, calibration, statistics=measured[compensator])
        prune_(executor, method(compensator), budget)

    def sweep() -> None:
        executor = WholeExecutor(share(model, sites), sites, calibration, statistics=measured["bias"])
        prune_(executor, method("least_squares"), budget, sequential=True)

    measured: dict[str, object] = {}
    parts: dict[str, Callable[[], None]] = {
        "forward pass": forward,
        "calibrate, wifv and bias": lambda: calibrate("bias"),
        "calibrate, wifv and least squares": lambda: calibrate("least_squares"),
        "search, bias, slice": lambda: repair("bias"),
        "search, least squares, slice": lambda: repair("least_squares"),
        "search, sweep with least squares, slice": sweep,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(TURNS + 1):
        for name, part in parts.items():
            runs.clear()
            took = timed(part)
            if turn:
                seconds[name].append(took)
            else:
                print(f"{name}: layer 0 ran {len(runs) / len(tokens.split(8)):g} times", flush=True)
    plain = statistics.median(seconds["forward pass"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"{name}: {middle:.2f} s, {middle / plain:.2f} forward passes")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
