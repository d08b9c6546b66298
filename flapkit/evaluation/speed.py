"""How fast models are and what memory they take, measured side by side in one process.

A machine's speed drifts: it warms up, and others use it. Models are therefore timed in turns, A B A B, so that whatever
slows one down slows the other as well, and medians are compared.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from flapkit.system.errors import InputError

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: a prompt goes in, and tokens come out one after another.

    Args:
        batch_size: prompts at once.
        prompt: tokens of a prompt.
        tokens: tokens that are then generated, greedily, without stopping at an end token.
        repetitions: how often each model is timed.
        warm_up: turns before, which do not count.
        seed: of the prompt, whose tokens are random.
    """

    batch_size: int = 1
    prompt: int = 512
    tokens: int = 64
    repetitions: int = 7
    warm_up: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure that was measured several times.

    Args:
        median: the middle value.
        low: the lower quartile.
        high: the upper quartile.
        values: all of them, in the order of the turns.
    """

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up values; at least one."""
        low, middle, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        )
        return cls(middle, low, high, tuple(values))


@dataclass(frozen=True, slots=True)
class Speed:
    """A model's figures.

    Args:
        params: all its parameters.
        read_params: those that every token is multiplied by: all but an embedding that is only looked up.
        weights: bytes of all parameters.
        peak: bytes at the peak: the weights, and the most that one turn takes beside them; None where the system does
            not tell.
        prefill_macs: multiply-accumulates of one prompt, attention over the whole square included.
        decode_macs: the same of one more token after the prompt.
        prefill: prompt tokens a second.
        decode: generated tokens a second.
        first_token: seconds from the prompt to the first token.
    """

    params: int
    read_params: int
    weights: int
    peak: int | None
    prefill_macs: int
    decode_macs: int
    prefill: Spread
    decode: Spread
    first_token: Spread


@dataclass(slots=True)
class _Times:
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)


@torch.no_grad()
def measure_speed(
    models: Mapping[str, PreTrainedModel], workload: Workload, *, compiled: bool = False, tick: Tick = lambda: None
) -> dict[str, Speed]:
    """Time models in turns.

    Args:
        models: name -> model, in evaluation mode, all on one device.
        workload: what is timed.
        compiled: run the models through torch.compile; compiling is part of the warm-up.
        tick: called after each turn, ``turns`` times.

    Raises:
        InputError: a model whose context does not hold the prompt and the tokens.
    """
    for name, model in models.items():
        _check(name, model, workload)
    prompts = {name: _prompt(model, workload) for name, model in models.items()}
    # Counted and weighed before they are compiled: neither sees into compiled code.
    macs = {name: _macs(model, prompts[name]) for name, model in models.items()}
    peaks = {name: _peak(model, prompts[name], workload.tokens) for name, model in models.items()}
    runs: dict[str, Any] = {name: torch.compile(m, dynamic=True) if compiled else m for name, m in models.items()}
    times = {name: _Times() for name in models}
    for turn in range(workload.warm_up + workload.repetitions):
        for name in models:
            seconds = _run(runs[name], prompts[name], workload.tokens)
            tick()
            if turn >= workload.warm_up:
                _note(times[name], seconds, workload)
    return {name: _speed(model, macs[name], peaks[name], times[name]) for name, model in models.items()}


def turns(models: int, workload: Workload) -> int:
    """Count the turns of so many models, those of the warm-up included."""
    return models * (workload.warm_up + workload.repetitions)


def read_params(model: PreTrainedModel) -> int:
    """Count the parameters that every token is multiplied by: all but an embedding that is only looked up."""
    table: Any = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table
    count: int = model.num_parameters() - (0 if tied else table.numel())
    return count


def _check(name: str, model: PreTrainedModel, workload: Workload) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = workload.prompt + workload.tokens
    if context is not None and needed > context:
        raise InputError(
            f"{name}: {workload.prompt} tokens of prompt and {workload.tokens} more do not fit its context of {context}"
        )


def _prompt(model: PreTrainedModel, workload: Workload) -> Tensor:
    generator = torch.Generator().manual_seed(workload.seed)
    shape = (workload.batch_size, workload.prompt)
    return torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator).to(model.device)


def _prefill(model: Any, prompt: Tensor) -> Any:
    # As generation does: only the last token's logits are needed.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(prompt, use_cache=True, **last)


def _step(model: Any, token: Tensor, cache: Any) -> Any:
    return model(token, past_key_values=cache, use_cache=True)


def _run(model: Any, prompt: Tensor, tokens: int) -> tuple[float, float, float]:
    """Run once, and return the seconds of the prompt, up to the first token, and of the other tokens."""
    clock = _CudaClock() if prompt.is_cuda else _Clock()
    began = time.perf_counter()
    clock.mark()
    out = _prefill(model, prompt)
    clock.mark()
    token = out.logits[:, -1:].argmax(dim=-1)
    token.tolist()
    first = time.perf_counter() - began
    clock.mark()
    for _ in range(tokens):
        out = _step(model, token, out.past_key_values)
        token = out.logits[:, -1:].argmax(dim=-1)
    clock.mark()
    prefill, _, decode = clock.seconds()
    return prefill, first, decode


class _Clock:
    """Seconds between marks, by the processor's clock."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]


class _CudaClock:
    """Seconds between marks, by the GPU's own events; work that was queued before is waited for."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in zip(self._marks, self._marks[1:], strict=False)]


def _note(times: _Times, seconds: tuple[float, float, float], workload: Workload) -> None:
    prefill, first, decode = seconds
    times.prefill.append(workload.batch_size * workload.prompt / prefill)
    times.decode.append(workload.batch_size * workload.tokens / decode)
    times.first_token.append(first)


def _speed(model: PreTrainedModel, macs: tuple[int, int], peak: int | None, times: _Times) -> Speed:
    return Speed(
        params=model.num_parameters(),
        read_params=read_params(model),
        weights=_weights(model),
        peak=peak,
        prefill_macs=macs[0],
        decode_macs=macs[1],
        prefill=Spread.of(times.prefill),
        decode=Spread.of(times.decode),
        first_token=Spread.of(times.first_token),
    )


def _weights(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _macs(model: PreTrainedModel, prompt: Tensor) -> tuple[int, int]:
    """Count the multiply-accumulates of a prompt, and of the token after it, over the whole batch."""
    counts = []
    # The plain attention is made of products that the counter knows on every device.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = _prefill(model, prompt)
        counts.append(counter.get_total_flops() // 2)
        with FlopCounterMode(display=False) as counter:
            _step(model, prompt[:, -1:], out.past_key_values)
        counts.append(counter.get_total_flops() // 2)
    return counts[0], counts[1]


def _peak(model: PreTrainedModel, prompt: Tensor, tokens: int) -> int | None:
    """Return the weights' bytes and the most that a turn takes beside them; None where the system does not say."""
    # Once before, so that what only the first turn takes, such as code from the disk, is not counted.
    _run(model, prompt, 1)
    if prompt.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(model, prompt, tokens)
        return _weights(model) + torch.cuda.max_memory_allocated() - before
    growth = _resident_growth(lambda: _run(model, prompt, tokens))
    return None if growth is None else _weights(model) + growth


def _resident_growth(run: Callable[[], object]) -> int | None:
    """Return by how many bytes the process grew at most while something ran; Linux alone tells."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not status.is_file() or not os.access(reset, os.W_OK):
        return None
    gc.collect()
    # What was freed but kept for later would hide what the run takes of it.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    # proc(5): 5 sets the high-water mark VmHWM to what is resident now.
    reset.write_text("5")
    before = _kilobytes(status, "VmHWM")
    run()
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
