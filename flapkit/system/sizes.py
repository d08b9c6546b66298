"""Numbers with a unit: as recipes write them (``100M`` parameters, ``4GB`` of memory), and with a noun in a text."""

from __future__ import annotations

import re

COUNTS = {"K": 1000, "M": 1000**2, "B": 1000**3, "T": 1000**4}
"""Letter behind a count -> its factor."""

BYTES = {
    **{unit: 1000 ** (power + 1) for power, unit in enumerate(("KB", "MB", "GB", "TB"))},
    **{unit: 1024 ** (power + 1) for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"))},
}
"""Unit of memory -> its bytes."""

_NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s?([A-Za-z]*)")


def parse_count(text: str) -> int:
    """Read a count, such as ``100M`` or ``134515008``.

    Raises:
        ValueError: it is none.
    """
    return _parse(text, {"": 1, **COUNTS})


def parse_bytes(text: str) -> int:
    """Read a number of bytes, such as ``200MB`` or ``1.5GiB``.

    Raises:
        ValueError: it is none, or has no unit.
    """
    return _parse(text, BYTES)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Write a number with its noun: ``1 window``, ``1,024 windows``.

    Args:
        number: how many.
        noun: for one.
        plural: for another number; by default the noun with an ``s``.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _parse(text: str, units: dict[str, int]) -> int:
    matched = _NUMBER.fullmatch(text)
    if matched is None or matched[2] not in units:
        raise ValueError(f"{text!r} is not a number with one of the units {', '.join(filter(None, units))}")
    return int(float(matched[1]) * units[matched[2]])
