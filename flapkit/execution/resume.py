"""Store what a run finishes in its work folder, so that an interrupted run can resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from flapkit.evaluation.protocol import EvaluationText, MeasuredPerplexity
from flapkit.execution.record_files import OtherFormatError, Record, read_record, write_record
from flapkit.system.errors import OutputError
from flapkit.system.json_files import parse_json
from flapkit.system.processes import broadcast_from_rank0, is_rank_zero
from flapkit.system.workdir import WorkDir, damaged_as_output_error, write_file

T = TypeVar("T")

Resume = Callable[[str, Callable[[], Record]], Record]
"""Reads the record of this name if an interrupted run has finished it; otherwise makes and stores it."""


def make_without_store(name: str, make: Callable[[], Record]) -> Record:
    """Make a record, and store nothing: for work without a folder."""
    return make()


def read_finished(path: Path) -> Record:
    """Read a record that an interrupted run has finished.

    Raises:
        OutputError: the file is damaged, or was written by a version of flapkit with another format.
    """
    try:
        with damaged_as_output_error(path):
            return read_record(path)
    except OtherFormatError as error:
        raise OutputError(
            f"{path}: written by another version of flapkit: {error}; resume with that version, or start over with "
            "--overwrite"
        ) from error


class ResumeStore:
    """What a run has finished, in its work folder.

    Args:
        work: the folder.
    """

    def __init__(self, work: WorkDir) -> None:
        self._work = work

    def find(self, name: str, make: Callable[[], Record]) -> Record:
        """Read a record that an interrupted run has finished; otherwise make and store it.

        Args:
            name: name of the record.
            make: makes it.

        Raises:
            OutputError: it cannot be written, or is damaged.
        """
        path = self._work.path(f"{name.replace('/', '_')}.safetensors")
        if self._has(path):
            return read_finished(path)
        record = make()
        if is_rank_zero():
            write_record(path, record)
        return record

    def _has(self, path: Path) -> bool:
        """Tell whether an interrupted run has written a file; all processes get the first one's answer."""
        return broadcast_from_rank0(lambda: self._work.resumed and path.is_file())

    def figures(self, name: str, kind: Any, measure: Callable[[], T]) -> T:
        """Read figures that an interrupted run has measured; otherwise measure and store them.

        Args:
            name: name of the figures.
            kind: their type, built from dataclasses and JSON's types.
            measure: measures them.

        Raises:
            OutputError: they cannot be written, or are damaged.
        """
        path = self._work.path(f"{name}.json")
        if self._has(path):
            with damaged_as_output_error(path):
                figures: T = TypeAdapter(kind).validate_python(parse_json(path.read_text(encoding="utf-8")))
            return figures
        figures = measure()
        if figures and is_rank_zero():
            write_file(path, json.dumps(figures, default=asdict))
        return figures

    def perplexity(
        self, name: str, texts: Mapping[str, EvaluationText], measure: Callable[[], Mapping[str, MeasuredPerplexity]]
    ) -> dict[str, MeasuredPerplexity]:
        """Read perplexities that an interrupted run has measured; otherwise measure and store them.

        Args:
            name: name of the figures.
            texts: name -> text.
            measure: measures them.
        """

        def figures() -> dict[str, tuple[float, float | None, int]]:
            values = measure().items()
            return {text: (value.perplexity, value.bits_per_byte, value.batch_size) for text, value in values}

        values = self.figures(name, dict[str, tuple[float, float | None, int]], figures)
        return {text: MeasuredPerplexity(texts[text], *measured) for text, measured in values.items()}
