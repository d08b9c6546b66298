"""Float64: where there is none, and sums over a weight without a whole copy of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 256
"""Rows converted at a time: 22 MB for LLaMA-7B's widest consumer."""


def float64_device(device: torch.device) -> torch.device:
    """Return where to sum in float64 what is on a device: there, or on the CPU, since Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def with_float64(tensor: Tensor) -> Tensor:
    """Return a tensor where it can be converted to float64: see ``float64_device``."""
    return tensor.to(float64_device(tensor.device))


def float64_rows(weight: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a weight [out_features, channels] in float64, at most ``ROWS`` at a time.

    ```python
    products = torch.cat([rows @ x for rows in float64_rows(weight)])
    ```
    """
    return (rows.to(torch.float64, copy=True) for rows in weight.split(ROWS))


def column_sums(weight: Tensor, power: int) -> Tensor:
    """Sum the absolute values of each column, raised to a power; float64 [channels]."""
    total = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    for rows in float64_rows(weight):
        total += rows.abs_().pow_(power).sum(dim=0)
    return total
