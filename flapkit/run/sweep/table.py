"""The rows of a sweep as a table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from flapkit.run.sweep.load import show
from flapkit.run.sweep.results import Row
from flapkit.text.files import format_of

Cell = str | float | int | None

_TEXT = re.compile(
    r"(?P<text>.*?)(?:, (?P<length>\d+) tokens)?(?:, stride (?P<stride>\d+))?(?: #(?P<number>\d+))?", re.S
)
"""The name of an evaluation text, as ``run/text.py`` makes it."""


def table(keys: Sequence[str], rows: Sequence[Row]) -> tuple[list[str], list[list[Cell]]]:
    """Arrange rows as a table: settings, parameters, removed share of the blocks, perplexities, error.

    Args:
        keys: the swept keys.
        rows: the results of the points.

    Returns:
        The headings of the columns, and the cells of each row.
    """
    texts = _texts(rows)
    names = [*keys, "parameters", "removed of blocks"]
    names += [f"perplexity, {name}{kind}" for name in texts for kind in ("", ", dense")]
    return [*names, "error"], [_cells(keys, texts, row) for row in rows]


def _texts(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.perplexity))


def _cells(keys: Sequence[str], texts: Sequence[str], row: Row) -> list[Cell]:
    settings: list[Cell] = [show(row.settings[key]) if key in row.settings else None for key in keys]
    removed = row.params["removed"] / row.params["blocks"] if row.params else None
    figures: list[Cell] = [
        row.perplexity[name][kind] if name in row.perplexity else None for name in texts for kind in ("pruned", "dense")
    ]
    return [*settings, row.params.get("pruned"), removed, *figures, row.error]


def columns(keys: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Name the columns of ``table.csv``, in the order of ``table``: words without spaces, joined by dots.

    A swept key is itself; then come ``parameters``, ``removed`` (of the blocks), for each text ``perplexity.valid.128``
    of the pruned model and ``perplexity.valid.128.dense``, and ``error``.

    Args:
        keys: the swept keys.
        rows: the results of the points.
    """
    texts = _distinct(f"perplexity.{_identifier(name)}" for name in _texts(rows))
    return [*keys, "parameters", "removed", *(f"{name}{kind}" for name in texts for kind in ("", ".dense")), "error"]


def _identifier(name: str) -> str:
    """Write a text's name as an identifier: ``valid.txt, 128 tokens, stride 64`` is ``valid.128.stride_64``."""
    match = _TEXT.fullmatch(name)
    assert match is not None  # Every part is optional, and the text is anything.
    text, length, stride, number = match.group("text", "length", "stride", "number")
    if (suffixes := format_of(Path(text))) is not None:
        text = Path(text).name[: -len("".join(suffixes))]
    word = re.sub(r"\W+", "_", text).strip("_") or "text"
    return ".".join(part for part in (word, length, stride and f"stride_{stride}", number) if part)


def _distinct(names: Iterable[str]) -> list[str]:
    """Number the names that are used more than once."""
    distinct: dict[str, None] = {}
    for name in names:
        number, other = 1, name
        while other in distinct:
            number += 1
            other = f"{name}_{number}"
        distinct[other] = None
    return list(distinct)


def to_csv(keys: Sequence[str], rows: Sequence[Row]) -> str:
    """Write the table as CSV, its columns named by ``columns``."""
    _, cells = table(keys, rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns(keys, rows))
    writer.writerows(cells)
    return text.getvalue()
