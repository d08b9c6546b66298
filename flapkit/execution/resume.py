"""What a run keeps in its work folder as it comes, and finds there when it goes on after it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from flapkit.checkpoint.weights import Weights, read_metadata, write_tensors
from flapkit.execution.cache import hash_tensors
from flapkit.system.json_files import parse_json
from flapkit.system.processes import broadcast_from_rank0, is_rank_zero
from flapkit.system.workdir import WorkDir, damaged_as_output_error, disk_error, write_file

T = TypeVar("T")

CHECKSUM = "checksum"


class Record(NamedTuple):
    """A finished piece of the work.

    Args:
        tensors: by name.
        metadata: what else is known, as JSON holds it.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = {}


Keep = Callable[[str, Callable[[], Record]], Record]
"""Finds a piece of a name, or makes it and keeps it."""


def make_without_store(name: str, make: Callable[[], Record]) -> Record:
    """Make a piece, and keep nothing: for work without a folder."""
    return make()


def write_record(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors of a finished piece of the work, whole or not at all.

    Args:
        path: the file; its folder is made.
        tensors: by name.
        metadata: what the file says of itself.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from error


def checksummed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what a file says of itself, and a checksum of all that is in it.

    Args:
        tensors: by name.
        metadata: what else it says.
    """
    return {**metadata, CHECKSUM: _checksum(tensors, metadata)}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    text = json.dumps([hash_tensors(sorted(tensors.items())), dict(metadata)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_checksummed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file whose checksum was written by ``checksummed``.

    Returns:
        The tensors by name, and what the file says of itself.

    Raises:
        OutputError: the file is damaged.
    """
    with damaged_as_output_error(path):
        weights, metadata = Weights.of([path]), read_metadata(path)
        tensors = weights.read(weights)
        if metadata.pop(CHECKSUM, None) != _checksum(tensors, metadata):
            raise ValueError("its checksum does not fit")
    return tensors, metadata


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
            tensors, metadata = read_checksummed(path)
            return Record(tensors, json.loads(metadata["says"]))
        piece = make()
        if is_rank_zero():
            write_record(path, piece.tensors, checksummed(piece.tensors, {"says": json.dumps(piece.metadata)}))
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
