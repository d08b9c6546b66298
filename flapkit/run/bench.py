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
from flapkit.model.precision import name_of
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
"""The ratios: the checkpoint's value over the dense model's."""


@dataclass(frozen=True, slots=True)
class BenchResult:
    """The result of a benchmark.

    Args:
        checkpoint: the measured model.
        against: the dense model it is compared with; None for none.
        workload: what was timed.
        environment: device, threads, dtype of the weights, whether the models were compiled, versions.
        speeds: path -> figures.
    """

    checkpoint: str
    against: str | None
    workload: Workload
    environment: Mapping[str, Any]
    speeds: Mapping[str, Speed]

    @property
    def ratios(self) -> dict[str, float]:
        """The checkpoint's figures over the dense model's; empty without one."""
        if self.against is None:
            return {}
        ours, dense = self.speeds[self.checkpoint], self.speeds[self.against]
        pairs = {name: (value(ours), value(dense)) for name, value in RATIOS.items()}
        return {name: first / second for name, (first, second) in pairs.items() if first is not None and second}

    @property
    def expected(self) -> float | None:
        """The speedup that would follow if time were proportional to the parameters read per token."""
        return 1 / self.ratios["read_params"] if self.against is not None else None

    def to_json(self) -> str:
        """Convert the result to JSON."""
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
        against: the dense model to compare with, likewise; None for none.
        workload: what to time.
        device: the device; ``auto`` is a GPU if there is one.
        dtype: dtype of the weights of both.
        compiled: run both through torch.compile.
        tick: called after each turn.

    Raises:
        InputError: a model cannot be loaded, the device is missing, or the context is too short.
    """
    if against == checkpoint:
        raise InputError(f"bench: {checkpoint} cannot be compared with itself; give the dense model")
    place = find_device(device)
    models = {path: load(path, dtype) for path in (against, checkpoint) if path is not None}
    for model in models.values():
        nn.Module.to(model, place)
    types = {model.dtype for model in models.values()}
    if len(types) > 1:
        names = " and ".join(sorted(map(name_of, types)))
        raise InputError(f"bench: the models are {names}; give --dtype to run both in the same")
    speeds = measure_speed(models, workload, compiled=compiled, tick=tick)
    environment = describe_machine(place, types.pop(), compiled=compiled)
    return BenchResult(checkpoint, against, workload, environment, speeds)


def describe_machine(place: torch.device, dtype: torch.dtype, *, compiled: bool) -> dict[str, Any]:
    """Describe what a model was timed on, and how: device, threads, dtype of the weights, versions."""
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "dtype": name_of(dtype),
        "compiled": compiled,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def find_device(device: Device) -> torch.device:
    """Return the device of an option; ``auto`` is a GPU if there is one.

    Raises:
        InputError: there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("bench: torch finds no GPU; leave --device out, or use --device cpu")
    return torch.device(device)
