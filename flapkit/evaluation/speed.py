"""Measure the speed and the memory of several models in one process.

A machine's speed drifts with temperature and load. Models are therefore timed in turns, A B A B, so that a slowdown
affects all of them, and medians are compared.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flapkit.model.costs import bytes_of
from flapkit.model.positions import check_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Workload:
    """The workload to time: prefill of a prompt, then generation token by token.

    Args:
        batch_size: prompts per batch.
        prompt: tokens per prompt.
        tokens: tokens to generate, greedily, without stopping at an end token.
        repetitions: number of timed turns per model.
        warm_up: number of untimed turns before.
        seed: seed of the prompt's random tokens.
    """

    batch_size: int = 1
    prompt: int = 512
    tokens: int = 64
    repetitions: int = 7
    warm_up: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity that was measured several times.

    Args:
        median: the median.
        low: the lower quartile.
        high: the upper quartile.
        values: all values, in the order of the turns.
    """

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values; at least one."""
        low, middle, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        )
        return cls(middle, low, high, tuple(values))


@dataclass(frozen=True, slots=True)
class Speed:
    """A model's speed and size.

    Args:
        params: number of parameters.
        read_params: number of parameters used for every token: all but an untied input embedding.
        weights: bytes of all parameters.
        peak: peak memory in bytes: weights plus working memory of a turn; None if the system does not report it.
        prefill_macs: multiply-accumulates of a batch of prompts, with full (not causal) attention; None if not counted.
        decode_macs: multiply-accumulates of one more token after the prompts; None if not counted.
        prefill: prompt tokens per second.
        decode: generated tokens per second.
        first_token: seconds from the prompt to the first token.
    """

    params: int
    read_params: int
    weights: int
    peak: int | None
    prefill_macs: int | None
    decode_macs: int | None
    prefill: Spread
    decode: Spread
    first_token: Spread


class Seconds(NamedTuple):
    """The seconds of a turn: of the prefill, until the first token, and of the generation."""

    prefill: float
    first_token: float
    decode: float


Turn = Callable[[], Seconds]
"""One turn of a model."""


def spreads(turns_: Sequence[Seconds], workload: Workload) -> dict[str, Spread]:
    """Summarise a model's turns, by the names of ``Speed``: tokens per second, and seconds to the first token."""
    prompt, tokens = workload.batch_size * workload.prompt, workload.batch_size * workload.tokens
    return {
        "prefill": Spread.of([prompt / turn.prefill for turn in turns_]),
        "decode": Spread.of([tokens / turn.decode for turn in turns_]),
        "first_token": Spread.of([turn.first_token for turn in turns_]),
    }


@torch.no_grad()
def measure_speed(
    models: Mapping[str, PreTrainedModel], workload: Workload, *, compiled: bool = False, tick: Tick = lambda: None
) -> dict[str, Speed]:
    """Time models in turns.

    Args:
        models: name -> model, in evaluation mode, all on one device.
        workload: the workload to time.
        compiled: compile the models with torch.compile; compilation is part of the warm-up.
        tick: called after each turn, ``turns`` times.

    Raises:
        InputError: a model has no positions for so many prompt and generated tokens.
    """
    for model in models.values():
        check_lengths(model, {"bench: prompt and generated tokens": workload.prompt + workload.tokens})
    prompts = {name: draw_prompt(model, workload) for name, model in models.items()}
    # Before compilation: the counters do not see into compiled code.
    macs = {name: _macs(model, prompts[name]) for name, model in models.items()}
    peaks = {name: _peak(model, prompts[name], workload.tokens) for name, model in models.items()}
    runs: dict[str, Any] = {name: torch.compile(m, dynamic=True) if compiled else m for name, m in models.items()}
    seconds = time_in_turns(runs, prompts, workload, tick)
    return {
        name: _speed(model, macs[name], peaks[name], spreads(seconds[name], workload)) for name, model in models.items()
    }


@torch.no_grad()
def time_in_turns(
    models: Mapping[str, Any], prompts: Mapping[str, Tensor], workload: Workload, tick: Tick = lambda: None
) -> dict[str, list[Seconds]]:
    """Run models of transformers in turns; ``take_turns`` says how.

    Args:
        models: name -> model.
        prompts: name -> tokens [batch, prompt].
        workload: the workload.
        tick: called after each turn.
    """
    turn = {name: partial(_run, model, prompts[name], workload.tokens) for name, model in models.items()}
    return take_turns(turn, workload, tick)


def take_turns(models: Mapping[str, Turn], workload: Workload, tick: Tick = lambda: None) -> dict[str, list[Seconds]]:
    """Run models in turns, A B A B, and return the seconds of every turn after the warm-up.

    Args:
        models: name -> one turn of the model.
        workload: the workload of a turn.
        tick: called after each turn.
    """
    seconds: dict[str, list[Seconds]] = {name: [] for name in models}
    for turn in range(workload.warm_up + workload.repetitions):
        for name, run in models.items():
            taken = run()
            tick()
            if turn >= workload.warm_up:
                seconds[name].append(taken)
    return seconds


def turns(models: int, workload: Workload) -> int:
    """Return the number of turns for a number of models, with the warm-up."""
    return models * (workload.warm_up + workload.repetitions)


def read_params(model: PreTrainedModel) -> int:
    """Count the parameters used for every token: all but an untied input embedding, which is only looked up."""
    table: Any = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table
    count: int = model.num_parameters() - (0 if tied else table.numel())
    return count


def draw_prompt(model: PreTrainedModel, workload: Workload) -> Tensor:
    """Draw the random tokens of a workload's prompts [batch, prompt], on the model's device."""
    return draw_tokens(model.config.get_text_config().vocab_size, workload).to(model.device)


def draw_tokens(vocabulary: int, workload: Workload) -> Tensor:
    """Draw the random tokens of a workload's prompts [batch, prompt]."""
    generator = torch.Generator().manual_seed(workload.seed)
    return torch.randint(vocabulary, (workload.batch_size, workload.prompt), generator=generator)


def _prefill(model: Any, prompt: Tensor) -> Any:
    # Like generation: compute only the last token's logits.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(prompt, use_cache=True, **last)


def _step(model: Any, token: Tensor, cache: Any) -> Any:
    return model(token, past_key_values=cache, use_cache=True)


def _run(model: Any, prompt: Tensor, tokens: int) -> Seconds:
    """Run once, and return the seconds."""
    clock = _CudaClock() if prompt.is_cuda else _Clock()
    start = time.perf_counter()
    clock.mark()
    out = _prefill(model, prompt)
    clock.mark()
    token = out.logits[:, -1:].argmax(dim=-1)
    token.tolist()
    first = time.perf_counter() - start
    clock.mark()
    for _ in range(tokens):
        out = _step(model, token, out.past_key_values)
        token = out.logits[:, -1:].argmax(dim=-1)
    clock.mark()
    prefill, _, decode = clock.seconds()
    return Seconds(prefill, first, decode)


class _Clock:
    """Seconds between marks, by the system's clock."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]


class _CudaClock:
    """Seconds between marks, by CUDA events; earlier work is finished first."""

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


def _speed(model: PreTrainedModel, macs: tuple[int, int], peak: int | None, measured: Mapping[str, Spread]) -> Speed:
    return Speed(
        params=model.num_parameters(),
        read_params=read_params(model),
        weights=bytes_of(model),
        peak=peak,
        prefill_macs=macs[0],
        decode_macs=macs[1],
        **measured,
    )


def _macs(model: PreTrainedModel, prompt: Tensor) -> tuple[int, int]:
    """Count the multiply-accumulates of a prompt, and of the next token, over the whole batch."""
    counts = []
    # The math backend consists of matrix products, which the counter supports on every device.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = _prefill(model, prompt)
        counts.append(counter.get_total_flops() // 2)
        with FlopCounterMode(display=False) as counter:
            _step(model, prompt[:, -1:], out.past_key_values)
        counts.append(counter.get_total_flops() // 2)
    return counts[0], counts[1]


def _peak(model: PreTrainedModel, prompt: Tensor, tokens: int) -> int | None:
    """Return the peak memory of a turn in bytes, with the weights; None if the system does not report it."""
    # A first turn, so that one-time costs such as loading code are not counted.
    _run(model, prompt, 1)
    if prompt.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(model, prompt, tokens)
        return bytes_of(model) + torch.cuda.max_memory_allocated() - before
    growth = _resident_growth(lambda: _run(model, prompt, tokens))
    return None if growth is None else bytes_of(model) + growth


def _resident_growth(run: Callable[[], object]) -> int | None:
    """Return the peak growth of the process in bytes during a call; None if not on Linux."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not status.is_file() or not os.access(reset, os.W_OK):
        return None
    gc.collect()
    # Return free memory to the system; otherwise the run could use it without growing the process.
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
