"""Why a pruned model is slower than the parameters that it reads promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flapkit.evaluation.speed import Speed, Workload
from flapkit.system.sizes import counted

SHORT = 0.9
"""A speedup below this fraction of the expected one is explained."""

ALIGNED = 32
"""Kernels are slow for widths that are not multiples of this."""


@dataclass(frozen=True, slots=True)
class Widths:
    """The parts of a pruned model that its speed depends on, beside its parameters.

    Args:
        layers: number of layers.
        inputs: input channels of its consumers.
        head: parameters of its head.
    """

    layers: int
    inputs: Sequence[int]
    head: int


def shortfalls(dense: Speed, pruned: Speed, workload: Workload, widths: Widths | None) -> list[str]:
    """Explain why a pruned model is slower than its parameters promise.

    Args:
        dense: the dense model's speed and size.
        pruned: the pruned model's.
        workload: what was timed.
        widths: the pruned model's; None if they are not known.

    Returns:
        Sentences; none if nothing falls short.
    """
    expected = dense.read_params / pruned.read_params
    ratios = {name: getattr(pruned, name).median / getattr(dense, name).median for name in ("prefill", "decode")}
    short = {name: ratio for name, ratio in ratios.items() if ratio < SHORT * expected}
    if not short:
        return []
    lines = [f"{name} is {ratio:.2f} times the dense model's, expected {expected:.2f}" for name, ratio in short.items()]
    if widths is not None:
        odd = [width for width in widths.inputs if width % ALIGNED]
        if odd:
            lines.append(
                f"not a multiple of {ALIGNED}: {len(odd)} of {counted(len(widths.inputs), 'width')} (the first "
                f"is {odd[0]}), which is slow in kernels; prune with budget.multiple_of"
            )
    if "decode" in short:
        lines += _constant_time(dense, pruned, workload, widths)
    share = attention_share(pruned, workload)
    if share is not None and share >= 0.05:
        lines.append(f"attention over the cache is {share:.0%} of a token's multiply-accumulates")
    if widths is not None and widths.head >= 0.1 * pruned.read_params:
        lines.append(
            f"the head, which is not pruned, is {widths.head / pruned.read_params:.0%} of the parameters read per "
            "token, and counts in the expected speedup"
        )
    return lines


def attention_share(speed: Speed, workload: Workload) -> float | None:
    """Return the fraction of a generated token's multiply-accumulates that no parameter takes part in.

    None where they were not counted.
    """
    if not speed.decode_macs:
        return None
    return max(0.0, 1 - workload.batch_size * speed.read_params / speed.decode_macs)


def _constant_time(dense: Speed, pruned: Speed, workload: Workload, widths: Widths | None) -> list[str]:
    """Split a token's time into what is proportional to the parameters read and what is not, by the two models."""
    before, after = (workload.batch_size / speed.decode.median for speed in (dense, pruned))
    removed = 1 - pruned.read_params / dense.read_params
    if removed <= 0:
        return ["the pruned model reads as many parameters per token as the dense model"]
    # before = constant + proportional; after = constant + proportional * (1 - removed)
    constant = before - (before - after) / removed
    if after >= before:
        return ["a token takes no less time than in the dense model, so its time is not spent on reading parameters"]
    each = f", {1000 * constant / widths.layers:.2f} ms a layer" if widths is not None else ""
    return [
        f"of {1000 * before:.1f} ms a token of the dense model, {1000 * constant:.1f} ms "
        f"({constant / before:.0%}{each}) do not shrink with the parameters: norms, cache, attention, and the calls "
        "themselves"
    ]
