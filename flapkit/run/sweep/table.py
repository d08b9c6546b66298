"""The rows of a sweep as a table, with one for each dense model."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flapkit.evaluation.scores import Figure
from flapkit.run.sweep.load import show
from flapkit.run.sweep.results import Row
from flapkit.run.sweep.schema import DENSE, METHOD
from flapkit.text.files import format_of

Cell = str | float | int | None

Kind = Literal["text", "count", "share", "error", "number"]
"""What a column's cells are: texts, whole numbers, fractions of 1, standard errors of the column before, or numbers."""

_TEXT = re.compile(
    r"(?P<text>.*?)(?:, (?P<length>\d+) tokens)?(?:, stride (?P<stride>\d+))?(?: #(?P<number>\d+))?", re.S
)
"""The name of an evaluation text, as ``run/text.py`` makes it."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table.

    Args:
        name: its name in ``table.csv``: words without spaces, joined by dots.
        title: its heading for people.
        kind: what its cells are.
        cells: one for each row; None for an empty one.
    """

    name: str
    title: str
    kind: Kind
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    """A row of the table: one model, dense or pruned."""

    method: str | None
    settings: Mapping[str, Any]
    parameters: int | None = None
    removed: float | None = None
    perplexity: Mapping[str, Any] | None = None
    scores: Mapping[str, Figure] | None = None
    minutes: float | None = None
    error: str | None = None


def table(keys: Sequence[str], rows: Sequence[Row]) -> list[Column]:
    """Arrange rows as a table, after a row for each dense model.

    Args:
        keys: the swept keys.
        rows: the results of the points.
    """
    lines = [*_dense_lines(rows), *map(_line, rows)]

    def column(name: str, title: str, kind: Kind, cell: Callable[[_Line], Cell]) -> Column:
        return Column(name, title, kind, tuple(map(cell, lines)))

    def setting(key: str) -> Column:
        return column(key, key, "text", lambda line: show(line.settings[key]) if key in line.settings else None)

    def perplexity(text: str) -> Callable[[_Line], Cell]:
        return lambda line: (line.perplexity or {}).get(text)

    def score(task: str, what: Literal["value", "stderr"]) -> Callable[[_Line], Cell]:
        return lambda line: (line.scores or {})[task][what] if task in (line.scores or {}) else None

    columns = [column(METHOD, METHOD, "text", lambda line: line.method), *map(setting, keys)]
    columns.append(column("parameters", "parameters", "count", lambda line: line.parameters))
    columns.append(column("removed", "removed of blocks, %", "share", lambda line: line.removed))
    texts = list(dict.fromkeys(name for row in rows for name in row.perplexity))
    for text, name in zip(texts, _distinct(f"perplexity.{_identifier(text)}" for text in texts), strict=True):
        columns.append(column(name, f"perplexity, {text}", "number", perplexity(text)))
    for task in dict.fromkeys(task for row in rows for task in row.scores):
        columns.append(column(f"zero_shot.{task}", f"{task}, %", "share", score(task, "value")))
        columns.append(column(f"zero_shot.{task}.stderr", f"{task}, standard error", "error", score(task, "stderr")))
    columns.append(column("minutes", "minutes", "number", lambda line: line.minutes))
    return [*columns, column("error", "error", "text", lambda line: line.error)]


def _line(row: Row) -> _Line:
    removed = row.params["removed"] / row.params["blocks"] if row.params else None
    perplexity, scores = _figures(row, row.stage)
    parameters = row.params.get("pruned")
    return _Line(row.method, row.settings, parameters, removed, perplexity, scores, row.minutes, row.error)


def _dense_lines(rows: Sequence[Row]) -> list[_Line]:
    """Return a line for each dense model that was measured, and for each way in which it was."""
    distinct: dict[str, list[Row]] = {}
    for row in rows:
        if row.params:
            distinct.setdefault(json.dumps([row.params[DENSE], *_figures(row, DENSE)]), []).append(row)
    return [_dense_line(same) for same in distinct.values()]


def _dense_line(rows: Sequence[Row]) -> _Line:
    """Return the line of a dense model; of the settings, those of the model itself, where all rows have the same."""
    first = rows[0]
    settings = {
        key: value
        for key, value in first.settings.items()
        if key.split(".")[0] == "model" and all(row.settings.get(key) == value for row in rows)
    }
    return _Line(DENSE, settings, first.params[DENSE], 0.0, *_figures(first, DENSE))


def _figures(row: Row, model: str) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Return the perplexity of each text, and the score of each task, of one of a row's models."""
    perplexity = {text: measured[model] for text, measured in row.perplexity.items()}
    return perplexity, {task: scores[model] for task, scores in row.scores.items()}


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


def to_csv(columns: Sequence[Column]) -> str:
    """Write a table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in columns)
    writer.writerows(zip(*(column.cells for column in columns), strict=True))
    return text.getvalue()
