"""Read a checkpoint's tensors on demand, and write safetensors files atomically."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flapkit.model.soundness import check_finite
from flapkit.system.workdir import disk_error

INDEX = "model.safetensors.index.json"
"""The file that maps tensors to weight files."""

PARTIAL = ".partial"
"""Suffix of an incomplete file."""


class Weights(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, memory-mapped on demand.

    Args:
        files: name of a tensor -> its safetensors file.
        model: the model's name for error messages; if given, every tensor is checked to be finite when it is read.
    """

    def __init__(self, files: Mapping[str, Path], model: str = "") -> None:
        self._files = files
        self._model = model

    @classmethod
    def of(cls, files: Iterable[Path], model: str = "") -> Weights:
        """Open the tensors of some safetensors files."""
        return cls({name: file for file in files for name in _names(file)}, model)

    def __getitem__(self, name: str) -> Tensor:
        return self.read([name])[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read several tensors, mapping each file once; it stays mapped while one of its tensors is in use."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in members}
        if self._model:
            for name, tensor in tensors.items():
                check_finite(f"model {self._model}: {name}", tensor)
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def index(self) -> str:
        """Return the content of ``model.safetensors.index.json``."""
        size = sum(self[name].nbytes for name in self)
        names = {name: file.name for name, file in sorted(self._files.items())}
        return json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2) + "\n"


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def read_metadata(file: Path) -> dict[str, str]:
    """Read a safetensors file's metadata."""
    with safe_open(file, framework="pt") as tensors:
        return dict(tensors.metadata() or {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, and rename it when it is on the disk.

    Args:
        path: the file to write; its folder is created.
        tensors: tensors by name, on any device.
        metadata: the file's metadata.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        _write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=PARTIAL, dir=path.parent)
    temporary = Path(name)
    try:
        # Locked while this process lives: ``remove_abandoned`` removes unlocked files only.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, temporary, metadata=dict(metadata))
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove incomplete files of ``write_tensors`` whose process has died."""
    for partial in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError), partial.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by the part of their names before the last slash."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, leaf = name.rpartition("/")
        groups.setdefault(group, {})[leaf] = tensor
    return groups
