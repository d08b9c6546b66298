from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")

from flapkit.evaluation.significance import compare


def test_the_exact_test_by_hand() -> None:
    first = [1] * 9 + [0] * 1 + [1] * 20 + [0] * 5
    second = [0] * 9 + [1] * 1 + [1] * 20 + [0] * 5
    found = compare(first, second)
    assert (found.only_first, found.only_second) == (9, 1)
    assert found.difference == pytest.approx(-8 / 35)
    # Two-sided: 2 * (C(10,0) + C(10,1)) / 2^10.
    assert found.p_value == pytest.approx(2 * 11 / 1024)
    assert found.stderr == pytest.approx(math.sqrt(10 - 64 / 35) / 35)


def test_equal_answers_differ_by_nothing() -> None:
    found = compare([1, 0, 1], [1, 0, 1])
    assert (found.p_value, found.difference, found.stderr) == (1.0, 0.0, 0.0)


def test_it_does_not_matter_who_comes_first() -> None:
    first, second = [1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 0, 1]
    assert compare(first, second).p_value == compare(second, first).p_value
    assert compare(first, second).difference == -compare(second, first).difference


def test_the_items_have_to_be_the_same() -> None:
    for first, second in (([], []), ([1], [1, 0])):
        with pytest.raises(ValueError, match="the same items"):
            compare(first, second)
