"""Time a checkpoint, alone or against the dense model, and compute the expected speedup."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from flapkit.checkpoint.load import DType, load, load_config
from flapkit.evaluation.speed import Speed, Tick, Workload, measure_speed, spreads, take_turns
from flapkit.model.declaration import declaration_of
from flapkit.model.empty import skeleton
from flapkit.model.layout import sites_of
from flapkit.model.precision import name_of
from flapkit.run.engines import ENGINES, Engine, EngineName
from flapkit.run.shortfall import Widths, shortfalls
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
        reasons: why the checkpoint is slower than its parameters promise; none if it is not.
    """

    checkpoint: str
    against: str | None
    workload: Workload
    environment: Mapping[str, Any]
    speeds: Mapping[str, Speed]
    reasons: Sequence[str] = ()

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
    engine: EngineName = "transformers",
    device: Device = "auto",
    dtype: DType = "auto",
    compiled: bool = False,
    tick: Tick = lambda: None,
) -> BenchResult:
    """Load one or two models and time them in turns.

    Args:
        checkpoint: a folder, a hub id, or ``builtin:NAME``; for llama.cpp a GGUF file.
        against: the dense model to compare with, likewise; None for none.
        workload: what to time.
        engine: the program that runs the models.
        device: the device; ``auto`` is a GPU if there is one.
        dtype: dtype of the weights of both.
        compiled: run both through torch.compile.
        tick: called after each turn.

    Raises:
        InputError: a model cannot be loaded, the engine or the device is missing, or the context is too short.
    """
    if against == checkpoint:
        raise InputError(f"bench: {checkpoint} cannot be compared with itself; give the dense model")
    paths = [path for path in (against, checkpoint) if path is not None]
    place = find_device(device)
    if engine == "transformers":
        speeds, type_ = _time_transformers(paths, workload, place, dtype, compiled=compiled, tick=tick)
        environment = describe_machine(place, name_of(type_), compiled=compiled)
    else:
        program = ENGINES[engine]
        program.check_installed(engine)
        if compiled:
            raise InputError(f"bench: --compile works only with the engine transformers; leave it out with {engine}")
        for path in paths:
            program.check(path, workload, dtype)
        speeds, version = _time_engine(program, paths, workload, place, dtype, tick)
        environment = {**describe_machine(place, dtype, compiled=False), "version": version}
    environment["engine"] = engine
    reasons: list[str] = []
    if against is not None:
        reasons = shortfalls(speeds[against], speeds[checkpoint], workload, _widths(checkpoint))
    return BenchResult(checkpoint, against, workload, environment, speeds, reasons)


def _time_transformers(
    paths: Sequence[str], workload: Workload, place: torch.device, dtype: DType, *, compiled: bool, tick: Tick
) -> tuple[dict[str, Speed], torch.dtype]:
    """Time models in transformers; return the speeds, and the type of the weights."""
    models = {path: load(path, dtype) for path in paths}
    for model in models.values():
        nn.Module.to(model, place)
    types = {model.dtype for model in models.values()}
    if len(types) > 1:
        names = " and ".join(sorted(map(name_of, types)))
        raise InputError(f"bench: the models are {names}; give --dtype to run both in the same type")
    return measure_speed(models, workload, compiled=compiled, tick=tick), types.pop()


def _time_engine(
    program: type[Engine], paths: Sequence[str], workload: Workload, place: torch.device, dtype: DType, tick: Tick
) -> tuple[dict[str, Speed], str]:
    """Time models in another program; return the speeds, and the program's version."""
    with ExitStack() as stack:
        models: dict[str, Engine] = {}
        for path in paths:
            models[path] = program(path, workload, place.type, dtype, len(paths))
            stack.callback(models[path].close)
        seconds = take_turns({path: model.run for path, model in models.items()}, workload, tick)
    taken = {path: spreads(turns, workload) for path, turns in seconds.items()}
    speeds = {
        path: Speed(model.params, model.read_params, model.weights, None, None, None, **taken[path])
        for path, model in models.items()
    }
    return speeds, models[paths[-1]].version


def _widths(checkpoint: str) -> Widths | None:
    """Read what a pruned checkpoint's speed depends on; None for a file, or a model that flapkit did not prune."""
    if checkpoint.endswith(".gguf"):
        return None
    config = load_config(checkpoint)
    if not hasattr(config, "flapkit"):
        return None
    model = skeleton(config)
    sites = sites_of(model, declaration_of(config))
    layers = len({site.layer for site in sites})
    return Widths(layers, [site.channels for site in sites], model.get_output_embeddings().weight.numel())


def describe_machine(place: torch.device, dtype: str, *, compiled: bool) -> dict[str, Any]:
    """Describe what a model was timed on, and how: device, threads, dtype of the weights, versions."""
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "dtype": dtype,
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
