"""Choose the number of windows per batch."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from flapkit.model.spread import is_spread
from flapkit.system.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

CPU_BYTES = 2**30
"""Working memory of a batch on a CPU, if the machine has at least eight times as much."""

CPU_TOKENS = 2**12
"""Tokens of a batch on a CPU; larger batches do not fit its caches and were slower in measurements."""

LARGEST = 128
"""Maximum number of windows per batch."""

log = logging.getLogger(__name__)


def first_batch_size(model: PreTrainedModel, length: int, device: torch.device) -> int:
    """Choose an initial batch size from sizes only, so that a machine always chooses the same.

    Args:
        model: the model to evaluate.
        length: tokens per window.
        device: the device it will run on; one that is spread over several runs where its weights are.

    Returns:
        A power of two, at most ``LARGEST``.
    """
    if device.type == "cuda":
        weights = Counter[torch.device]()
        for parameter in model.parameters():
            weights[parameter.device if is_spread(model) else device] += _local(parameter).nbytes
        left = min(torch.cuda.get_device_properties(on).total_memory - size for on, size in weights.items())
        # A quarter, since the estimate per window does not include the model's own temporary tensors.
        budget = left // 4
    else:
        budget = min(CPU_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
        budget = min(budget, CPU_TOKENS * bytes_per_token(model))
    fitting = max(1, budget // (length * bytes_per_token(model)))
    return int(min(LARGEST, 2 ** (fitting.bit_length() - 1)))


def _local(parameter: Tensor) -> Tensor:
    """Return this process's shard of a weight, or the weight itself."""
    from torch.distributed.tensor import DTensor

    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def bytes_per_token(model: PreTrainedModel) -> int:
    """Estimate the working memory per token: logits, logits in float32, and the activations of a layer."""
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    return int(config.vocab_size * (size + 4) + size * 20 * config.hidden_size)


def halving(sizes: Mapping[str, int], evaluate: Callable[[Mapping[str, int]], T]) -> tuple[T, Mapping[str, int]]:
    """Evaluate, and halve the batch sizes each time the GPU runs out of memory.

    Args:
        sizes: name of a text or task -> initial batch size.
        evaluate: runs the whole evaluation.

    Returns:
        The result, and the batch sizes that were used.

    Raises:
        RunError: a single window does not fit.
    """
    while True:
        try:
            return evaluate(sizes), sizes
        except torch.OutOfMemoryError as error:
            if max(sizes.values()) == 1:
                raise RunError("evaluation: a single window does not fit in GPU memory; reduce the length") from error
        # Outside the handler: inside it, the error still references the batch.
        torch.cuda.empty_cache()
        sizes = {name: max(1, size // 2) for name, size in sizes.items()}
        log.info("evaluation: out of GPU memory; retrying with batch size %s", ", ".join(map(str, sizes.values())))
