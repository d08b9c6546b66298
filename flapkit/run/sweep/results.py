"""The rows of a sweep, one JSON object per line, written as points finish; an interrupted sweep resumes from them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pydantic
from pydantic import ConfigDict

from flapkit.evaluation.scores import Figure
from flapkit.run.report.report_record import Total
from flapkit.run.sweep.schema import DENSE
from flapkit.system.errors import OutputError
from flapkit.system.json_files import parse_json

RESULTS = "results.jsonl"
PRUNED, RECOVERED = "pruned", "recovered"
"""The models that a point measures: what it prunes, or what it then trains."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one point.

    Args:
        id: hash of the point's whole recipe, of the weights and of the text.
        settings: dotted key -> value; not those of the method.
        error: the error; None if the point succeeded.
        params: as in a run's ``result.json``.
        perplexity: name of the text -> ``dense``, and ``pruned`` or ``recovered`` -> perplexity, and more.
        zero_shot: task -> its settings and all metrics of both models, as in a run's ``result.json``.
        scores: task, and ``mean`` -> the score of both models that tables show.
        minutes: wall time of the search, the repair and the training; not of the calibration that points share, or of
            the evaluation. A search that points share counts for each of them.
        seconds: stage -> wall time.
        warnings: flapkit's warnings.
        method: name of the method; None for none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    id: str
    settings: Mapping[str, Any]
    error: str | None = None
    params: Mapping[str, Total] = field(default_factory=dict)
    perplexity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    zero_shot: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    minutes: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    method: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a number that tables and plots show is missing."""
        counted = self.params.keys() >= {"dense", "pruned", "removed", "blocks"} and self.params["blocks"] > 0
        if (self.params or self.perplexity or self.scores) and not counted:
            raise ValueError("params: expected dense, pruned, removed and blocks")
        for text, measured in self.perplexity.items():
            values = [measured.get(which) for which in (DENSE, self.stage)]
            if not all(isinstance(value, (int, float)) and value > 0 for value in values):
                raise ValueError(f"perplexity: {text}: expected dense and {self.stage}, both over 0")
        for task, score in self.scores.items():
            if not score.keys() >= {DENSE, self.stage}:
                raise ValueError(f"scores: {task}: expected dense and {self.stage}")

    @property
    def stage(self) -> str:
        """Which model is measured beside the dense one: ``recovered`` if the point trains, otherwise ``pruned``."""
        measured = [*self.perplexity.values(), *self.scores.values()]
        return RECOVERED if any(RECOVERED in models for models in measured) else PRUNED


_ROW = pydantic.TypeAdapter(Row)


class Results:
    """The rows in a folder.

    Args:
        folder: created if it is missing.

    Raises:
        OutputError: the folder holds other files and no results, cannot be written, or its rows are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RESULTS
        if self._path.is_symlink():
            raise OutputError(f"output {folder}: {self._path} is a link; choose another folder")
        if folder.is_dir() and not self._path.is_file() and any(folder.iterdir()):
            raise OutputError(f"output {folder}: holds files but no {RESULTS}; choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.rows = self._read()
        except OSError as error:
            raise OutputError(f"output {folder}: cannot be written: {error}") from error

    def add(self, row: Row) -> None:
        """Append a row; it is on the disk when this returns."""
        line = json.dumps(asdict(row), ensure_ascii=False) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error}; finished rows are kept") from error
        self.rows[row.id] = row

    def of(self, id_: str, settings: Mapping[str, Any], method: str | None) -> Row:
        """Return the row of a point, under the names that the sweep's file gives it now."""
        return replace(self.rows[id_], settings=settings, method=method)

    def done(self, id_: str) -> bool:
        """Return whether a point has a result without an error."""
        return id_ in self.rows and self.rows[id_].error is None

    def _read(self) -> dict[str, Row]:
        if not self._path.is_file():
            return {}
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            log.warning("%s: removed the last line, which an interrupted sweep left incomplete", self._path)
            os.truncate(self._path, whole)
        rows = {}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                row = _ROW.validate_python(parse_json(line.decode()))
            except ValueError as error:
                what = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else error
                raise OutputError(f"{self._path}:{number}: damaged: {what}; remove this line") from error
            rows[row.id] = row
        return rows
