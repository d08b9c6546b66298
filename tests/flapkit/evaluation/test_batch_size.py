from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from conftest import make_llama

from flapkit.evaluation.batch_size import CPU_BYTES, LARGEST, bytes_per_token, first_batch_size, halving
from flapkit.system.errors import RunError

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [2, 128, 512, 4096, 10**6])
def test_it_is_a_power_of_two_that_fits(length: int) -> None:
    model = make_llama()
    size = first_batch_size(model, length, CPU)
    assert 1 <= size <= LARGEST
    assert size & (size - 1) == 0
    assert size == 1 or size * length * bytes_per_token(model) <= CPU_BYTES


def test_longer_windows_are_fewer() -> None:
    sizes = [first_batch_size(make_llama(), length, CPU) for length in (64, 256, 1024, 8192)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_it_halves_until_it_fits() -> None:
    tried: list[Mapping[str, int]] = []

    def evaluate(sizes: Mapping[str, int]) -> str:
        tried.append(sizes)
        if max(sizes.values()) > 4:
            raise torch.OutOfMemoryError("no room")
        return "done"

    assert halving({"long": 3, "short": 16}, evaluate) == ("done", {"long": 1, "short": 4})
    assert tried == [{"long": 3, "short": 16}, {"long": 1, "short": 8}, {"long": 1, "short": 4}]


def test_where_nothing_fits() -> None:
    def evaluate(sizes: Mapping[str, int]) -> None:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(RunError, match="a single window does not fit"):
        halving({"text": 8}, evaluate)
