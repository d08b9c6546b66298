"""Measure how fast this machine multiplies matrices, to tell how long a run will compute."""

from __future__ import annotations

import time

import torch

SECONDS = 0.1
"""How long products are measured."""

SIZES = {"cpu": 512}
"""Type of device -> rows of the matrices; other devices need larger ones to be busy."""

LARGE = 4096


def measure_pace(device: torch.device, dtype: torch.dtype) -> float:
    """Return how many floating-point operations a second the product of two square matrices does.

    Args:
        device: where they are multiplied.
        dtype: their type.
    """
    size = SIZES.get(device.type, LARGE)
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    # The first product starts the device and its libraries; reading a value waits for it.
    float((left @ right)[0, 0])
    start, products, seconds = time.perf_counter(), 0, 0.0
    while seconds < SECONDS:
        float((left @ right)[0, 0])
        products += 1
        seconds = time.perf_counter() - start
    return products * 2.0 * size**3 / seconds
