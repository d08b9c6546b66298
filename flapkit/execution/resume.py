"""What a run keeps in its work folder as it comes, and finds there when it goes on after it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from flapkit.execution.records import OtherFormatError, Record, read_record, write_record
from flapkit.system.errors import OutputError
from flapkit.system.json_files import parse_json
from flapkit.system.processes import broadcast_from_rank0, is_rank_zero
from flapkit.system.workdir import WorkDir, damaged_as_output_error, write_file

T = TypeVar("T")

Keep = Callable[[str, Callable[[], Record]], Record]
"""Finds a piece of a name, or makes it and keeps it."""


def make_without_store(name: str, make: Callable[[], Record]) -> Record:
    """Make a piece, and keep nothing: for work without a folder."""
    return make()


def read_finished(path: Path) -> Record:
    """Read a record that an interrupted run has left.

    Raises:
        OutputError: the file is damaged, or of a version of flapkit whose records have another format.
    """
    try:
        with damaged_as_output_error(path):
            return read_record(path)
    except OtherFormatError as error:
        raise OutputError(
            f"{path}: another version of flapkit left it there: {error}; resume with that version, or begin anew with "
            "--overwrite"
        ) from error


class ResumeStore:
    """The pieces of a run in its work folder.

    Args:
        work: the folder.
    """

    def __init__(self, work: WorkDir) -> None:
        self._work = work

    def find(self, name: str, make: Callable[[], Record]) -> Record:
        """Find what a stopped run has finished, or finish it now and keep it.

        Args:
            name: what the piece is called.
            make: makes it.

        Raises:
            OutputError: it cannot be written, or is damaged.
        """
        path = self._work.path(f"{name.replace('/', '_')}.safetensors")
        if self._has(path):
            return read_finished(path)
        piece = make()
        if is_rank_zero():
            write_record(path, piece)
        return piece

    def _has(self, path: Path) -> bool:
        """Tell whether a stopped run has left a file; all processes get the first one's answer."""
        return broadcast_from_rank0(lambda: self._work.resumed and path.is_file())

    def figures(self, name: str, kind: Any, measure: Callable[[], T]) -> T:
        """Find figures that a stopped run has measured, or measure them now and keep them.

        Args:
            name: what they are called.
            kind: their type, made of dataclasses and of what JSON holds.
            measure: measures them.

        Raises:
            OutputError: they cannot be written, or are damaged.
        """
        path = self._work.path(f"{name}.json")
        if self._has(path):
            with damaged_as_output_error(path):
                found: T = TypeAdapter(kind).validate_python(parse_json(path.read_text(encoding="utf-8")))
            return found
        found = measure()
        if found and is_rank_zero():
            write_file(path, json.dumps(found, default=asdict))
        return found
