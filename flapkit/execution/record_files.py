"""Records: the file format of cached statistics, of finished stages in work folders, and of layers' measurements.

A record is a safetensors file. The metadata in its header holds the version of the format, a checksum of everything in
the record, and the record's own metadata as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flapkit.checkpoint.weights import write_tensors
from flapkit.system.json_files import parse_json

FORMAT = 1
"""Version of the format: raise it when the layout of records changes, or the data that statistics receive."""

_FORMAT, _CHECKSUM, _METADATA = "record_format", "checksum", "metadata"


class RecordError(ValueError):
    """A file is not a record, or is damaged."""


class OtherFormatError(Exception):
    """A record has another version of the format."""


@dataclass(frozen=True, slots=True)
class Record:
    """Tensors with metadata.

    Args:
        tensors: by name.
        metadata: JSON data, by name.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def write_record(path: Path, record: Record) -> None:
    """Write a record, atomically.

    Args:
        path: the file; its folder is created.
        record: what to write.

    Raises:
        OutputError: the file cannot be written.
    """
    metadata = json.dumps(dict(record.metadata), sort_keys=True)
    header = {_FORMAT: str(FORMAT), _CHECKSUM: _checksum(record.tensors, metadata), _METADATA: metadata}
    write_tensors(path, record.tensors, header)


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        OtherFormatError: its format has another version.
        RecordError: the file cannot be read, is damaged, or is not a record.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            metadata = _metadata(header)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise RecordError(str(error)) from error
    if header.get(_CHECKSUM) != _checksum(tensors, header[_METADATA]):
        raise RecordError("its checksum does not match")
    return Record(tensors, metadata)


def read_record_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a record without its tensors; the checksum is not verified.

    Raises:
        OtherFormatError: as ``read_record``.
        RecordError: likewise.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _metadata(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise RecordError(str(error)) from error


def _metadata(header: Mapping[str, str]) -> dict[str, Any]:
    version = header.get(_FORMAT)
    if version is None or _METADATA not in header:
        raise RecordError("not a record of flapkit")
    if version != str(FORMAT):
        raise OtherFormatError(f"its format version is {version}; this flapkit reads version {FORMAT}")
    try:
        metadata = parse_json(header[_METADATA])
    except ValueError as error:
        raise RecordError(f"its metadata is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise RecordError("its metadata is not an object")
    return metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: str) -> str:
    return hashlib.sha256(f"{hash_tensors(sorted(tensors.items()))} {metadata}".encode()).hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of tensors; they are hashed on several threads."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = pool.map(lambda item: _hash(*item), tensors)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _hash(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
