"""Time a checkpoint, alone or against the dense model, and compute the expected speedup."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from flapkit.checkpoint.load import DType, load
from flapkit.evaluation.speed import Speed, Tick, Workload, measure_speed
from flapkit.system.errors import InputError

Device = Literal["auto", "cpu", "cuda"]

RATIOS: Mapping[str, Callable[[Speed], float | None]] = {
    "params": lambda speed: speed.params,
    "read_params": lambda speed: speed.read_params,
    "prefill_macs": lambda speed: speed.prefill_macs,
    "decode_macs": lambda speed: speed.decode_macs,
    "peak": lambda speed: speed.peak,
    "prefill": lambda speed: speed.prefill.median,
    "decode": lambda speed: speed.decode.median,
    "first_token": lambda speed: speed.first_token.median,
}
"""What is compared, the checkpoint's value over the dense model's."""


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured, and how.

    Args:
        checkpoint: the model that was asked about.
        against: the dense model beside it; None where it stood alone.
        workload: what was timed.
        environment: device, threads, type of the weights, whether they were compiled, versions.
        speeds: path -> figures.
    """

    checkpoint: str
    against: str | None
    workload: Workload
    environment: Mapping[str, Any]
    speeds: Mapping[str, Speed]

    @property
    def ratios(self) -> dict[str, float]:
        """The checkpoint's figures over the dense model's; empty where it stood alone."""
        if self.against is None:
            return {}
        ours, dense = self.speeds[self.checkpoint], self.speeds[self.against]
        pairs = {name: (value(ours), value(dense)) for name, value in RATIOS.items()}
        return {name: first / second for name, (first, second) in pairs.items() if first is not None and second}

    @property
    def expected(self) -> float | None:
        """How many times as fast the checkpoint would be if time went by the parameters that each token reads."""
        return 1 / self.ratios["read_params"] if self.against is not None else None

    def to_json(self) -> str:
        """Write everything as JSON."""
        data = asdict(self) | {"ratios": self.ratios, "expected": self.expected}
        return json.dumps(data, indent=2) + "\n"


def bench(
    checkpoint: str,
    against: str | None,
    workload: Workload,
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    compiled: bool = False,
    tick: Tick = lambda: None,
) -> BenchResult:
    """Load one or two models and time them in turns.

    Args:
        checkpoint: a folder, a hub id, or ``builtin:NAME``.
        against: the same of the dense model, if there is one to compare with.
        workload: what is timed.
        device: where; ``auto`` is a GPU where there is one.
        dtype: type of the weights of both.
        compiled: run both through torch.compile.
        tick: called after each turn.

    Raises:
        InputError: a model that cannot be loaded, a device that is not there, or a context that is too short.
    """
    if against == checkpoint:
        raise InputError(f"bench: {checkpoint} against itself says nothing; name the dense model")
    place = _device(device)
    models = {path: load(path, dtype) for path in (against, checkpoint) if path is not None}
    for model in models.values():
        nn.Module.to(model, place)
    types = {str(model.dtype).removeprefix("torch.") for model in models.values()}
    if len(types) > 1:
        raise InputError(f"bench: the models are {' and '.join(sorted(types))}; give --dtype, so that both are alike")
    speeds = measure_speed(models, workload, compiled=compiled, tick=tick)
    environment = {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "dtype": types.pop(),
        "compiled": compiled,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return BenchResult(checkpoint, against, workload, environment, speeds)


def _device(device: Device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("bench: there is no GPU here that torch can use; leave --device out, or say cpu")
    return torch.device(device)
