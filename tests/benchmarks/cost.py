"""Time what pruning adds to running the model, in turns, and draw how the cost grows.

```
python tests/benchmarks/cost.py overhead           # calibration against a plain forward pass, 3 M and 148 M parameters
python tests/benchmarks/cost.py share              # what comes after calibration against it, at LLaMA-7B's widths
python tests/benchmarks/cost.py memory             # what pruning takes beside a model of 148 M parameters
python tests/benchmarks/cost.py growth FIGURE.svg  # calibration against windows and against layers
```

All of it with the method's defaults (wifv, al_am, bias), random tokens and, but for the bundled model, random float32
weights, on the CPU, in one process and in turns: A B A B. Medians are shown, with quartiles.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import psutil
import torch
from flapkit_compensators.bias import Bias
from flapkit_metrics.wifv import WIFV
from flapkit_searchers.al_am import ALAM
from matplotlib.figure import Figure
from random_llama import random_llama
from transformers import PreTrainedModel

import flapkit
from flapkit.execution.executor import CalibrationText, prune_
from flapkit.execution.runtime import Runtime
from flapkit.execution.whole import WholeExecutor
from flapkit.model.budget import Budget
from flapkit.model.site import Site
from flapkit.model.surgery import copy_sharing_weights
from flapkit.pruning.algorithm import Method
from flapkit.pruning.collector import Statistics

T = TypeVar("T")

METHOD = Method(WIFV(), ALAM(), (Bias(),))
TURNS = 7


def text_of(model: PreTrainedModel, windows: int, length: int = 128, batch_size: int = 8) -> CalibrationText:
    """Draw random tokens."""
    generator = torch.Generator().manual_seed(1)
    return CalibrationText(torch.randint(model.config.vocab_size, (windows, length), generator=generator), batch_size)


def measured(model: PreTrainedModel, sites: Sequence[Site], text: CalibrationText) -> Statistics:
    """Calibrate as a run does, under Lightning."""
    return Runtime({"accelerator": "cpu"}).calibrate(model, sites, METHOD.statistics, text.data())


@torch.no_grad()
def forward(model: PreTrainedModel, text: CalibrationText) -> None:
    """Run the backbone alone over the same batches."""
    for batch in text.windows.split(text.batch_size):
        model.base_model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)


def timed(work: Callable[..., T], *args: Any) -> tuple[float, T]:
    """Call a function, and return how long it took besides what it returned."""
    began = time.perf_counter()
    found = work(*args)
    return time.perf_counter() - began, found


def both_clocks(work: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """Call a function, and return how long it took: by the clock, and of the processor, which others may share."""
    began = time.process_time()
    seconds, _ = timed(work, *args)
    return seconds, time.process_time() - began


def quartiles(values: list[float]) -> str:
    """Write a median and its quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def overhead() -> None:
    """Compare calibration with the forward pass that it needs anyway, by the clock and by the processor's own time."""
    for model, windows in ((flapkit.load("builtin:tiny-llama", "float32"), 512), (random_llama(), 16)):
        sites, text = flapkit.sites(model), text_of(model, windows)
        forward(model, text)
        measured(model, sites, text)
        turns = [
            (both_clocks(measured, model, sites, text), both_clocks(forward, model, text)) for _ in range(2 * TURNS)
        ]
        alone = quartiles([plain[0] for _, plain in turns])
        print(f"{model.num_parameters():,} parameters, {windows} windows of 128 tokens: forward {alone} s")
        for clock, name in enumerate(("wall", "processor")):
            ratio = quartiles([calibrated[clock] / plain[clock] for calibrated, plain in turns])
            print(f"  calibration / forward, {name} time: {ratio}")


def share_of_pruning(windows: int = 8, paper: int = 1024, layers: int = 2) -> None:
    """Compare all that comes after calibration with calibration, for layers of LLaMA-7B's shape."""
    model = random_llama(layers, 4096, 11008, 32, vocabulary=64)
    sites, text = flapkit.sites(model), text_of(model, windows)
    budget = Budget.over(sites, 0.2)
    turns = []
    for _ in range(3):
        calibrating, found = timed(measured, model, sites, text)
        executor = WholeExecutor(copy_sharing_weights(model, sites), sites, text, statistics=found)
        turns.append((calibrating, timed(prune_, executor, METHOD, budget)[0]))
    calibrating, pruning = (statistics.median(each) for each in zip(*turns, strict=True))
    whole = calibrating * paper / windows
    print(f"{layers} layers of LLaMA-7B's shape: calibration {calibrating:.1f} s for {windows} windows of 128")
    print(
        f"search, correction and slicing {pruning:.2f} s; calibration with {paper} windows {whole:.0f} s by proportion"
    )
    print(f"share {100 * pruning / whole:.2f} %")


def memory() -> None:
    """Watch what pruning takes beside a model that is in memory already."""
    model, process = random_llama(), psutil.Process()
    text = text_of(model, 16)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    activations = 8 * 128 * (4 * (4 * 768 + 3 * 2560) + 8 * 2 * 2560)
    forward(model, text)
    before = process.memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")
    flapkit.prune_(model, text.calibration, ratio=0.2)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    taken = int(line.split()[1]) * 1024 - before
    print(
        f"weights {weights / 1e6:.0f} MB, a batch's activations {activations / 1e6:.0f} MB, taken {taken / 1e6:.0f} MB"
    )
    print(f"beside weights and a batch's activations: {100 * (taken - activations) / weights:.1f} % of the weights")


def growth(figure: Path) -> None:
    """Draw calibration's time against windows and against layers."""
    model = flapkit.load("builtin:tiny-llama", "float32")
    windows = {count: (model, flapkit.sites(model), text_of(model, count)) for count in (16, 32, 64, 128)}
    deep = {count: random_llama(count, 384, 1024, 6, vocabulary=4096) for count in (2, 4, 8, 12)}
    layers = {count: (each, flapkit.sites(each), text_of(each, 32)) for count, each in deep.items()}
    mpl.rcParams["svg.hashsalt"] = "flapkit"
    drawing = Figure(figsize=(7, 2.8), layout="constrained")
    axes = drawing.subplots(1, 2)
    for axis, (what, works) in zip(axes, {"windows": windows, "layers": layers}.items(), strict=True):
        times: dict[int, list[float]] = {count: [] for count in works}
        for _ in range(TURNS):
            for count, work in works.items():
                times[count].append(timed(measured, *work)[0])
        medians = {count: statistics.median(found) for count, found in times.items()}
        slope, constant = statistics.linear_regression(list(medians), list(medians.values()))
        fit = statistics.correlation(list(medians), list(medians.values())) ** 2
        print(f"{what}: { ({count: round(value, 3) for count, value in medians.items()}) }")
        print(f"  {1000 * slope:.1f} ms each, {constant:.2f} s besides, R² {fit:.4f}")
        axis.plot(list(medians), list(medians.values()), "o", color="#2563eb")
        axis.plot([0, max(medians)], [constant, constant + slope * max(medians)], color="#2563eb", linewidth=1)
        axis.set(xlabel=what, ylabel="calibration, s", xlim=(0, None), ylim=(0, None))
    drawing.savefig(figure, metadata={"Date": None})


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    {"overhead": overhead, "share": share_of_pruning, "memory": memory, "growth": lambda: growth(Path(rest[0]))}[what]()
