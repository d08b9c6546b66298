"""Numbers with units."""

from __future__ import annotations

import pytest

from flapkit.system.sizes import counted, parse_bytes, parse_count


def test_numbers_with_units():
    assert (parse_count("100M"), parse_count("1.5B"), parse_count("7")) == (10**8, 1_500_000_000, 7)
    assert (parse_bytes("200MB"), parse_bytes("1.5 GiB"), parse_bytes("1KB")) == (2 * 10**8, 3 * 2**29, 1000)


@pytest.mark.parametrize("text", ["", "MB", "200", "200 Mb", "200MO", "-1MB", "1e3MB", "1_0MB"])
def test_no_number_of_bytes(text):
    with pytest.raises(ValueError, match="not a number with one of the units KB, MB"):
        parse_bytes(text)


def test_a_number_and_its_noun_agree():
    assert [counted(number, "trial") for number in (0, 1, 2, 1024)] == [
        "0 trials",
        "1 trial",
        "2 trials",
        "1,024 trials",
    ]
    assert [counted(number, "pass", "passes") for number in (1, 2)] == ["1 pass", "2 passes"]
