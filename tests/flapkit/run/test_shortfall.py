from __future__ import annotations

import pytest

from flapkit.evaluation.speed import Speed, Spread, Workload
from flapkit.run.shortfall import Widths, attention_share, shortfalls

WORK = Workload()


def speed(read: int, token: float, macs: int | None = None) -> Speed:
    """A model that takes so many seconds for a token, and a tenth of it for one of a prompt."""
    decode, prefill = Spread.of([1 / token]), Spread.of([10 / token])
    return Speed(read, read, 4 * read, None, macs, macs, prefill, decode, Spread.of([token]))


@pytest.mark.parametrize("constant", [0.002, 0.008])
def test_the_time_that_does_not_shrink_is_found(constant):
    # A token takes a constant and one millisecond for each hundred parameters.
    dense, pruned = (speed(read, constant + read * 1e-5) for read in (1000, 500))
    first, time = shortfalls(dense, pruned, WORK, Widths(10, [64, 96], 10))[-2:]
    assert first.startswith("decode is ")
    assert f"expected {1000 / 500:.2f}" in first
    assert f"{1000 * constant:.1f} ms ({constant / (constant + 0.01):.0%}, {100 * constant:.2f} ms a layer)" in time


def test_what_keeps_its_promise_is_not_explained():
    assert shortfalls(speed(1000, 0.01), speed(500, 0.005), WORK, Widths(1, [33], 400)) == []


def test_widths_attention_and_head_are_named():
    lines = shortfalls(speed(1000, 0.01), speed(500, 0.011, macs=1000), WORK, Widths(2, [64, 33, 31], 200))
    text = "\n".join(lines)
    assert "prefill is 0.91 times the dense model's, expected 2.00" in text
    assert "not a multiple of 32: 2 of 3 widths (the first is 33)" in text
    assert "a token takes no less time than in the dense model" in text
    assert "attention over the cache is 50%" in text
    assert "the head, which is not pruned, is 40%" in text


def test_attention_is_what_no_parameter_takes_part_in():
    assert attention_share(speed(500, 1, macs=1000), WORK) == 0.5
    assert attention_share(speed(500, 1, macs=2000), Workload(batch_size=4)) == 0
    assert attention_share(speed(500, 1), WORK) is None
