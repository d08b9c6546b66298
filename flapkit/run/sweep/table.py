"""The rows of a sweep as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from flapkit.run.sweep.load import show
from flapkit.run.sweep.results import Row

Cell = str | float | int | None


def table(keys: Sequence[str], rows: Sequence[Row]) -> tuple[list[str], list[list[Cell]]]:
    """Arrange rows as a table: settings, parameters, removed share of the blocks, perplexities, error.

    Args:
        keys: the swept keys.
        rows: the results of the points.

    Returns:
        The names of the columns, and the cells of each row.
    """
    texts = list(dict.fromkeys(name for row in rows for name in row.perplexity))
    names = [*keys, "parameters", "removed of blocks"]
    names += [f"perplexity, {name}{kind}" for name in texts for kind in ("", ", dense")]
    return [*names, "error"], [_cells(keys, texts, row) for row in rows]


def _cells(keys: Sequence[str], texts: Sequence[str], row: Row) -> list[Cell]:
    settings: list[Cell] = [show(row.settings[key]) if key in row.settings else None for key in keys]
    removed = row.params["removed"] / row.params["blocks"] if row.params else None
    figures: list[Cell] = [
        row.perplexity[name][kind] if name in row.perplexity else None for name in texts for kind in ("pruned", "dense")
    ]
    return [*settings, row.params.get("pruned"), removed, *figures, row.error]


def to_csv(keys: Sequence[str], rows: Sequence[Row]) -> str:
    """Write the table as CSV."""
    names, cells = table(keys, rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(cells)
    return text.getvalue()
