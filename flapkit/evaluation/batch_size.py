"""How many windows go through a model at once, found without asking anybody."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from flapkit.system.errors import RunError

T = TypeVar("T")

CPU_BYTES = 2**30
"""Working memory of a batch on a CPU: the same on every machine that has eight times as much."""

CPU_TOKENS = 2**12
"""Tokens of a batch on a CPU: its caches hold no more, and larger ones were slower where it was measured."""

LARGEST = 128
"""Windows at once, at most."""

log = logging.getLogger(__name__)


def first_batch_size(model: PreTrainedModel, length: int, device: torch.device) -> int:
    """Choose a batch size to begin with, from sizes alone, so that the same machine chooses the same.

    Args:
        model: the model to evaluate.
        length: tokens in a window.
        device: where it will run.

    Returns:
        A power of two, at most ``LARGEST``.
    """
    weights = sum(_held(parameter).nbytes for parameter in model.parameters())
    if device.type == "cuda":
        # A quarter, since the estimate of what a window takes knows nothing of the family's own temporaries.
        budget = (torch.cuda.get_device_properties(device).total_memory - weights) // 4
    else:
        budget = min(CPU_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
        budget = min(budget, CPU_TOKENS * bytes_per_token(model))
    fitting = max(1, budget // (length * bytes_per_token(model)))
    return int(min(LARGEST, 2 ** (fitting.bit_length() - 1)))


def _held(parameter: Tensor) -> Tensor:
    """Return what this process holds of a weight: of a sharded one its part."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def bytes_per_token(model: PreTrainedModel) -> int:
    """Estimate the working memory of a token: its logits, those converted to float32, and a layer's activations."""
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    return int(config.vocab_size * (size + 4) + size * 20 * config.hidden_size)


def halving(sizes: Mapping[str, int], evaluate: Callable[[Mapping[str, int]], T]) -> tuple[T, Mapping[str, int]]:
    """Evaluate with some batch sizes, and with half of them for as long as a GPU's memory does not hold them.

    Args:
        sizes: what is evaluated -> the batch size to begin with.
        evaluate: does it all, from the beginning.

    Returns:
        What it returned, and the batch sizes that it had.

    Raises:
        RunError: not even one window fits.
    """
    while True:
        try:
            return evaluate(sizes), sizes
        except torch.OutOfMemoryError as error:
            if max(sizes.values()) == 1:
                raise RunError("evaluation: the GPU's memory does not hold one window; set a smaller length") from error
        # Outside of the handler, where the error no longer holds the batch.
        torch.cuda.empty_cache()
        sizes = {name: max(1, size // 2) for name, size in sizes.items()}
        log.info("evaluation: the batch does not fit; trying %s", ", ".join(map(str, sizes.values())))
